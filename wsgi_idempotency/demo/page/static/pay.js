"use strict";

const AMOUNT = 4200; // cents
const element = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

// Not crypto.randomUUID(): browsers have that on https and localhost only.
function random(bytes) {
  return Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) =>
    byte.toString(16).padStart(2, "0")
  ).join("");
}

let purchase;

// A purchase is what the customer means to do once. Its key is made here, before the first
// request, and goes with every further one.
function newPurchase() {
  const on = element("protection").checked;
  purchase = { order: random(4), key: random(16), protected: on, requests: 0, began: null };
  element("order").textContent = purchase.order;
  element("key").textContent = purchase.key;
  element("door").textContent = on ? "on: POST /protected/charges" : "off: POST /unprotected/charges";
  fill(element("log"), [[cell("Nothing sent yet.", { span: 4 })]]);
  say("Nothing charged yet.");
}

async function tap() {
  const mine = purchase;
  mine.began ??= performance.now();
  mine.requests += 1;
  const name = `tap ${mine.requests}`;
  if (mine.requests === 1) element("log").replaceChildren();
  for (let attempt = 1; ; attempt += 1) {
    const after = await send(mine, attempt === 1 ? name : `${name}, sent again`);
    await showLedger(mine);
    if (after === null) return;
    await pause(after);
  }
}

// Sends one request; says after how many seconds to send it again, or null.
async function send(mine, name) {
  const after = ((performance.now() - mine.began) / 1000).toFixed(2);
  const row = document.createElement("tr");
  if (mine === purchase) element("log").append(row);
  const show = (answer, meaning, look) =>
    row.replaceChildren(cell(name), cell(`${after} s`), cell(answer), cell(meaning, { look }));
  show("…", "under way");
  let response, body;
  try {
    response = await fetch(`${mine.protected ? "protected" : "unprotected"}/charges`, {
      method: "POST",
      headers: { "Idempotency-Key": mine.key },
      body: new URLSearchParams({ order: mine.order, amount: AMOUNT }),
    });
    body = await response.json();
  } catch {
    show("none", "The connection was lost. Is the demo still running?", "bad");
    return null;
  }
  const replayed = response.headers.get("Idempotency-Replayed") === "true";
  const wait = Number(response.headers.get("Retry-After"));
  if (response.status === 201 && replayed) {
    show("201, replayed", `the stored answer: ${body.id}`, "good");
  } else if (response.status === 201) {
    show("201", `charged: ${body.id}`);
  } else if (response.status === 409 && wait > 0) {
    show("409", `another tap is still being charged; told to come back in ${wait} s`);
    return wait;
  } else {
    show(String(response.status), body.detail ?? body.error ?? "refused", "bad");
  }
  return null;
}

let asked = 0;
let shown = 0;

async function showLedger(mine) {
  const turn = (asked += 1);
  let all, own;
  try {
    [all, own] = await Promise.all([
      ledger(""),
      ledger(`?${new URLSearchParams({ order: mine.order })}`),
    ]);
  } catch {
    return; // the request's own row says so
  }
  if (turn < shown) return; // a later look was answered first
  shown = turn;
  const orders = all.charges.map((charge) => charge.order);
  const rows = all.charges.map((charge) => {
    const count = orders.filter((order) => order === charge.order).length;
    return [
      cell(charge.id),
      cell(charge.order),
      cell(`€${(charge.amount / 100).toFixed(2)}`),
      cell(charge.protected ? "on" : "off"),
      cell(count > 1 ? `order charged ${times(count)}` : "", { look: "bad" }),
    ];
  });
  fill(element("ledger"), rows.length ? rows : [[cell("No charges yet.", { span: 5 })]]);
  if (mine !== purchase) return;
  if (own.rows > 0) {
    say(`Order ${mine.order} was charged ${times(own.rows)}.`, own.rows === 1 ? "good" : "bad");
  }
}

function times(count) {
  return { 1: "once", 2: "twice" }[count] ?? `${count} times`;
}

async function ledger(query) {
  const response = await fetch(`ledger${query}`);
  if (!response.ok) throw new Error(`the ledger answered ${response.status}`);
  return response.json();
}

function cell(text, { span = 1, look = "" } = {}) {
  const made = document.createElement("td");
  made.textContent = text;
  made.colSpan = span;
  made.className = look;
  return made;
}

function fill(body, rows) {
  body.replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells);
      return row;
    })
  );
}

function say(text, look = "") {
  const verdict = element("verdict");
  verdict.textContent = text;
  verdict.className = `note ${look}`;
}

element("pay").addEventListener("click", tap);
element("double").addEventListener("click", () => { tap(); tap(); });
element("new").addEventListener("click", newPurchase);
element("protection").addEventListener("change", newPurchase);
newPurchase();
showLedger(purchase);
