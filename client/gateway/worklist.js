// Fetches the page again and brings its live part up to date, unless it is paused or hidden. What has not changed stays
// the same element, so that focus, selection and scrolling stay; what has an id is known by it.
"use strict";
const EVERY_MS = 3000;
const LIMIT_MS = 10_000;
const pause = document.getElementById("pause");
const said = document.getElementById("said");

function update(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const known = new Map([...old.children].filter((each) => each.id).map((each) => [each.id, each]));
  let at = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const same = wanted.id ? known.get(wanted.id) : at && !at.id && at.nodeName === wanted.nodeName ? at : null;
    if (!same || !isAhead(same, at)) {
      old.insertBefore(wanted, at);
      continue;
    }
    while (at && at !== same) at = dropped(at);
    update(same, wanted);
    at = same.nextSibling;
  }
  while (at) at = dropped(at);
}

// Whether an element is still to come; one that was passed over for another order is gone.
function isAhead(node, at) {
  for (let next = at; next; next = next.nextSibling) if (next === node) return true;
  return false;
}

function dropped(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}

async function renew() {
  const live = document.getElementById("live");
  if (pause.checked || document.hidden) return;
  try {
    const answer = await fetch(location.href, {
      headers: { "X-Renew": "1" },
      redirect: "manual",
      signal: AbortSignal.timeout(LIMIT_MS),
    });
    if (answer.type === "opaqueredirect" || answer.status === 401) return location.assign("/login");
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (pause.checked) return; // ticked meanwhile
    const wasHere = live.contains(document.activeElement);
    update(live, page.getElementById("live"));
    // Where the link that had the focus is gone, a keyboard goes on from the table.
    const isHere = live.contains(document.activeElement);
    if (wasHere && !isHere) document.getElementById("jobs")?.focus({ preventScroll: true });
    said.textContent = "";
  } catch {
    said.textContent = "The page could not be renewed; what it shows is old.";
  }
}

async function renewAlways() {
  await renew();
  setTimeout(renewAlways, EVERY_MS);
}
setTimeout(renewAlways, EVERY_MS);
