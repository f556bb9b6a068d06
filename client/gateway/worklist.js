// Fetches the page again and puts its live part in place, unless it is paused, hidden, or somebody is at a link in it.
"use strict";
const EVERY_MS = 3000;
const pause = document.getElementById("pause");
const said = document.getElementById("said");
async function renew() {
  const live = document.getElementById("live");
  if (pause.checked || document.hidden || live.contains(document.activeElement)) return;
  try {
    const answer = await fetch(location.href, { headers: { "X-Renew": "1" }, redirect: "manual" });
    if (answer.type === "opaqueredirect" || answer.status === 401) return location.assign("/login");
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    live.replaceChildren(...page.getElementById("live").childNodes);
    said.textContent = "";
  } catch {
    said.textContent = "The page could not be renewed; what it shows is old.";
  }
}
setInterval(renew, EVERY_MS);
