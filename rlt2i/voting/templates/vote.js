"use strict";
const $ = (id) => document.getElementById(id);
const KEYS = {
  ArrowLeft: "left", a: "left", 1: "left",
  ArrowRight: "right", b: "right", 2: "right",
  ArrowDown: "tie", e: "tie", 0: "tie",
  s: "skip", u: "undo", Backspace: "undo",
};
const TINY = 96;       // pixels a side up to which an image is shown pixel by pixel
const SETTLED = 250;   // ms for which a new pair cannot be voted on, so that a double tap is one vote
const NEXT = "The next images are being drawn. This page goes on by itself.";
const LAST = "That was the last pair. For a few seconds it can be undone.";
let shown = "";        // the question whose images are on the page
let ready = false;     // whether both are loaded
let readyAt = 0;
let busy = false;      // a vote is on its way
let asked = 0;         // requests so far; an answer to an older one is dropped

function notice(text) {
  $("message").textContent = text;
  $("notice").hidden = !text;
  $("pair").hidden = Boolean(text);
}

function enable(on, undo) {
  for (const id of ["left", "right", "tie", "skip"]) $(id).disabled = !on;
  $("undo").disabled = !undo;
}

async function ask(path, body) {
  const number = ++asked;
  const how = body && {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)};
  try {
    const reply = await fetch(path, how);
    const told = await reply.json();
    if (number !== asked) return;
    if (reply.ok || reply.status === 409) show(told);
    else unreachable(told.error);
  } catch {
    if (number === asked) unreachable("No answer. Is rlt2i still running? This page goes on when it is back at this address.");
  }
}

function unreachable(text) {
  shown = "";
  ready = false;
  enable(false, false);
  notice(text);
}

function show(state) {
  const question = state.question;
  const votes = state.votes === 1 ? "1 vote" : `${state.votes} votes`;
  $("count").textContent = state.prompts ? `${state.finished} of ${state.prompts} prompts · ${votes}` : votes;
  $("bar").setAttribute("aria-valuemax", String(state.prompts));
  $("bar").setAttribute("aria-valuenow", String(state.finished));
  $("done").style.width = `${state.prompts ? (100 * state.finished) / state.prompts : 0}%`;
  document.title = question ? "Vote" : state.over ? "Done" : "Waiting for images";
  $("hint").hidden = !question && !state.trouble;
  $("hint").textContent = state.trouble || "Choose the better image";
  if (!question) {
    shown = "";
    ready = false;
    $("prompt").textContent = "";
    enable(false, state.undo);
    notice(state.over || (state.complete ? LAST : NEXT));
    return;
  }
  if (question.name !== shown) load(question);
  for (const name of state.soon) new Image().src = `image/${name}`;
  enable(ready, state.undo);
}

async function load(question) {
  shown = question.name;
  ready = false;
  notice("");
  $("pair").classList.add("waits");
  $("prompt").textContent = question.prompt;
  const sides = ["left", "right"].map((side) => {
    const image = $(`${side}-image`);
    image.src = `image/${question[side]}`;
    $(side).classList.remove("chosen");
    return image;
  });
  try {
    await Promise.all(sides.map((image) => image.decode()));
  } catch {
    if (shown === question.name) shown = "";  // tried again with the next state
    return;
  }
  if (shown !== question.name) return;
  for (const image of sides) image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= TINY);
  $("pair").classList.remove("waits");
  ready = true;
  readyAt = performance.now();
  enable(true, !$("undo").disabled);
}

async function act(what) {
  if (busy) return;
  if (what === "undo" ? $("undo").disabled : !ready || performance.now() - readyAt < SETTLED) return;
  busy = true;
  if (what === "left" || what === "right") $(what).classList.add("chosen");
  await ask(what === "undo" ? "undo" : "vote", what === "undo" ? {} : {question: shown, choice: what});
  for (const side of ["left", "right"]) $(side).classList.remove("chosen");
  busy = false;
}

for (const what of ["left", "right", "tie", "skip", "undo"]) {
  $(what).addEventListener("click", () => { $(what).blur(); act(what); });
}
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.altKey || event.shiftKey) return;
  const undo = event.key === "z" && (event.ctrlKey || event.metaKey);
  if ((event.ctrlKey || event.metaKey) && !undo) return;
  const what = undo ? "undo" : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!what) return;
  event.preventDefault();
  act(what);
});
setInterval(() => { if (!busy) ask("state"); }, 1000);
ask("state");
