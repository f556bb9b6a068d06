"""Seeded mutations of messages: REQUEST, the multipart body of a STOW-RS request, the PDUs of an association."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence

from mutator import EXTREME_LONG, OF_COMMANDS, Random, implicit_elements, of_bytes, of_dicom, set_number, truncate

# ----------------------------------------------------------------------------------------------------------------- JSON

_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    "",
    " ",
    "\0",
    "findings",
    "\ud800",
    "x" * 70,
    "x" * 40_000,
    "é" * 100,
    [],
    {},
    [[]],
    [None],
    {"role": "user"},
    [{"role": "user"}],
    {"a": {"b": 1}},
    "user",
    "assistant",
    "plain",
    "hashed",
    [1, "a"],
    ["a"] * 9,
    [""],
    "{x}",
    "{{ x }}",
    "<|image_pad|>",
    "<|vision_start|>",
    "<answer>",
)
_KEYS = (
    "task",
    "prompt",
    "variables",
    "mode",
    "history",
    "max_new_tokens",
    "temperature",
    "top_p",
    "repetition_penalty",
    "seed",
    "stop",
    "identifiers",
    "Task",
    "",
    "role",
    "content",
    "x",
    "\ud800",
    "k" * 300,
)


def of_request(request: dict, rng: Random) -> bytes:
    """A mutation of a REQUEST's values, of its structure, or of its text."""
    changed = json.loads(json.dumps(request))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        _change(changed, rng)
    text = json.dumps(changed, ensure_ascii=rng.random() < 0.5)
    raw = text.encode(rng.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig", "utf-32")), "surrogatepass")
    match rng.randrange(12):
        case 0 | 1 | 2 | 3:
            raw = of_bytes(raw, rng)
        case 4:
            raw = rng.choice((b"[", b'{"a":', b'{"history":[')) * rng.choice((1, 30, 3000)) + raw
        case 5:
            raw = raw[:-1] + b', "task": "findings", "task": 1}'
        case 6:
            raw = raw.replace(b":", rng.choice((b": NaN,", b": -Infinity", b":: ", b": 1e999,", b":" + b"9" * 5000)), 1)
        case 7:
            raw += rng.choice((b"\0", b" ", b"{}", b"\n", b"//", raw, b" " * 300_000))
    return raw


def _change(node: dict | list, rng: Random) -> None:
    """One value somewhere in it, or one more, or one less."""
    deeper = [value for value in (node.values() if isinstance(node, dict) else node) if isinstance(value, dict | list)]
    if deeper and rng.random() < 0.5:
        return _change(rng.choice(deeper), rng)
    if isinstance(node, dict):
        key = rng.choice(list(node) + list(_KEYS))
        if key in node and rng.random() < 0.2:
            del node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(_VALUES))
    elif node and rng.random() < 0.6:
        i = rng.randrange(len(node))
        if rng.random() < 0.3:
            del node[i]
        else:
            node[i] = copy.deepcopy(rng.choice((*_VALUES, node[0])))
    else:
        value = rng.choice(_VALUES)
        node.extend(copy.deepcopy(value) for _ in range(rng.choice((1, 1, 40))))


# ------------------------------------------------------------------------------------------------------------ multipart

_HEADERS = (
    b"Content-Type: application/dicom",
    b"Content-Type: text/plain",
    b"Content-Type",
    b"Content-Type: " + b"x" * 9000,
    b"Content-Encoding: gzip",
    b"Content-Transfer-Encoding: base64",
    b"Content-Transfer-Encoding: quoted-printable",
    b"Content-Transfer-Encoding: nonsense",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: x",
    b"Content-Disposition: form-data; name=\"\xff\"; filename*=utf-8''%",
    b"Content-Type: multipart/mixed; boundary=xyz",
    b"Content-Type: multipart/mixed",
    b": x",
    b"\0: \0",
    b" folded",
    b"Content-Type: application/dicom; transfer-syntax=*",
    b"Content-Encoding: deflate",
    b"X: \xff\xfe",
    b"A" * 70_000,
)
_KINDS = ("multipart/related; boundary=xyz",) * 6 + (
    'multipart/related; type="application/dicom"; boundary="xyz"',
    "multipart/related",
    "multipart/related; boundary=",
    'multipart/related; boundary="',
    "multipart/related; boundary=" + "x" * 71,
    "multipart/related; boundary=y",
    "multipart/form-data; boundary=xyz",
    "multipart/related;;boundary=xyz",
    "multipart/related; boundary=x yz",
    "multipart/related; boundary*=utf-8''xyz",
    "application/dicom",
    "",
    "multipart/",
    "multipart/related; boundary=xyz; boundary=a",
)


def of_multipart(parts: Sequence[bytes], rng: Random) -> tuple[str, bytes]:
    """Content-Type and body of a STOW-RS request, one of which is damaged in its frame or in a part."""
    mutate = rng.random() < 0.5
    bodies = [of_dicom(part, rng) if mutate and rng.random() < 0.7 else part for part in parts]
    pieces: list[bytes] = []
    for body in bodies:
        headers = [b"Content-Type: application/dicom"]
        if rng.random() < 0.3:
            headers[rng.randrange(2) :] = [rng.choice(_HEADERS) for _ in range(rng.randint(0, 3))]
        end = rng.choice((b"\r\n",) * 9 + (b"\n", b"\r", b""))
        pieces += [b"--xyz" + end, end.join(headers) + end * 2, body, b"\r\n"]
    pieces.append(
        rng.choice((b"--xyz--",) * 6 + (b"--xyz--\r\nepilogue", b"--xyz", b"", b"--xyz-", b"--xyz--\r\n--xyz--"))
    )
    match rng.randrange(8):
        case 0:
            i = rng.randrange(len(pieces))
            pieces[i] = of_bytes(pieces[i], rng)
        case 1:
            del pieces[rng.randrange(len(pieces))]
        case 2:
            rng.shuffle(pieces)
        case 3:
            pieces.insert(
                rng.randrange(len(pieces)), rng.choice((b"--xyz\r\n", b"preamble", b"\r\n\r\n", b"--xyz--\r\n"))
            )
    body = b"".join(pieces)
    return rng.choice(_KINDS), truncate(body, rng) if rng.random() < 0.05 else body


# ------------------------------------------------------------------------------------------------------------------ PDU


def of_pdus(pdus: Sequence[bytes], rng: Random, others: Sequence[Sequence[bytes]]) -> list[bytes]:
    """A sequence of PDUs with one to three damages: of one, or of their order."""
    out = list(pdus)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not out:
            break
        i = rng.randrange(len(out))
        match rng.randrange(12):
            case 0 | 1:
                out[i] = of_bytes(out[i], rng)
            case 2:  # the body, with a length that fits
                body = of_bytes(out[i][6:], rng)
                out[i] = out[i][:2] + struct.pack(">I", len(body)) + body
            case 3:
                out[i] = out[i][:2] + struct.pack(">I", rng.choice(EXTREME_LONG)) + out[i][6:]
            case 4:
                out[i] = bytes([rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 255))]) + out[i][1:]
            case 5:
                del out[i]
            case 6:
                out.insert(rng.randrange(len(out) + 1), out[i])
            case 7:
                j = rng.randrange(len(out))
                out[i], out[j] = out[j], out[i]
            case 8:
                out.insert(i, rng.choice(rng.choice(others)))
            case 9 | 10:
                out[i] = _of_value(out[i], rng)
            case _:
                out[i] = set_number(out[i][:40], rng) + out[i][40:]
    return out


def _of_value(pdu: bytes, rng: Random) -> bytes:
    """Inside a P-DATA-TF: its value's head, or an element of its command set."""
    if len(pdu) < 14 or pdu[0] != 4:
        return of_bytes(pdu, rng)
    head, body = bytearray(pdu[:12]), pdu[12:]
    choice = rng.randrange(5)
    if choice == 0:
        head[10] = rng.choice((0, 1, 2, 3, 5, 255))
    elif choice == 1:
        head[11] = rng.choice((0, 1, 2, 3, 4, 255))
    elif choice == 2:
        struct.pack_into(">I", head, 6, rng.choice(EXTREME_LONG))
    elif elements := implicit_elements(body, 0):
        element = rng.choice(elements)
        body = rng.choice(OF_COMMANDS)(body, rng, element)
        struct.pack_into(">I", head, 2, len(body) + 6)
        struct.pack_into(">I", head, 6, len(body) + 2)
    return bytes(head) + body
