// The page: pictures in, captions out, over the same API as everybody else's.

const AT_ONCE = 3; // requests on their way; the rest wait here rather than in the service's queue
const MOST_TRIES = 5;
const NO_WORDS = "(no words)";

const $ = (id) => document.getElementById(id);
const models = new Map();
const waiting = [];
const captions = new Map(); // of the cards on the page: file, model, caption and so on
let running = 0;

start();

async function start() {
  $("files").addEventListener("change", (event) => {
    add(event.target.files);
    event.target.value = ""; // the same file may be chosen again
  });
  document.addEventListener("paste", (event) => add(event.clipboardData.files));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") add(event.dataTransfer.files);
    });
  }
  $("csv").addEventListener("click", download);
  await listModels();
}

// Again and again until they are there: a page is opened while the service starts, too.
async function listModels() {
  const trouble = $("trouble");
  for (let tries = 1; ; tries += 1) {
    try {
      const answer = await fetch("v1/models");
      const body = await answer.json();
      if (!answer.ok) throw new Error(body.error.message);
      for (const model of body.models) {
        models.set(model.name, model);
        $("model").append(new Option(model.name, model.name, model.default, model.default));
      }
      trouble.hidden = true;
      return;
    } catch (error) {
      const reason = error instanceof TypeError ? "the service does not answer" : error.message;
      trouble.textContent = `The list of models cannot be fetched: ${reason}. Trying again.`;
      trouble.hidden = false;
    }
    await new Promise((resume) => setTimeout(resume, 1000 * Math.min(tries, 10)));
  }
}

function add(files) {
  for (const file of files) show(file);
}

function show(file) {
  const card = $("card").content.cloneNode(true).firstElementChild;
  const image = card.querySelector("img");
  const address = URL.createObjectURL(file);
  image.addEventListener("error", () => {
    image.hidden = true;
    card.querySelector(".no-preview").hidden = false;
  });
  image.src = address;
  image.alt = file.name;
  card.querySelector(".facts").textContent = file.name;
  card.querySelector(".remove").addEventListener("click", () => {
    URL.revokeObjectURL(address);
    captions.delete(card);
    $("all").hidden = !captions.size;
    const next = card.nextElementSibling ?? card.previousElementSibling;
    card.remove();
    (next?.querySelector(".remove") ?? $("files")).focus();
  });
  card.querySelector(".again").addEventListener("click", () => queue(card, file));
  card.querySelector(".copy").addEventListener("click", () => copy(card));
  $("results").prepend(card);
  queue(card, file);
}

function queue(card, file) {
  card.querySelector(".error").hidden = true;
  card.querySelector(".again").hidden = true;
  const caption = card.querySelector(".caption");
  caption.hidden = false;
  caption.ariaBusy = "true";
  waiting.push([card, file]);
  work();
}

async function work() {
  while (running < AT_ONCE && waiting.length) {
    const [card, file] = waiting.shift();
    if (!card.isConnected) continue; // removed meanwhile
    running += 1;
    ask(file)
      .then((found) => fill(card, file, found))
      .catch((error) => fail(card, file, error))
      .finally(() => {
        running -= 1;
        work();
      });
  }
}

async function ask(file) {
  const query = new URLSearchParams({ num_captions: $("captions").value });
  const model = $("model").value;
  if (model) query.set("model", model);
  if (models.get(model)?.attention) query.set("attention", "true");
  const form = new FormData();
  form.append("image", file, file.name || "pasted");
  for (let tries = 1; ; tries += 1) {
    const answer = await fetch(`v1/captions?${query}`, { method: "POST", body: form });
    const body = await answer.json();
    // Of other kinds of 503 the picture itself may be the cause: those a person sends again.
    if (body.error?.code === "overloaded" && tries < MOST_TRIES) {
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((resume) => setTimeout(resume, 1000 * seconds * tries));
      continue;
    }
    if (!answer.ok) throw new Error(body.error.message);
    return body;
  }
}

function fill(card, file, found) {
  const best = found.captions[0];
  const line = card.querySelector(".caption");
  line.ariaBusy = "false";
  if (best.attention?.length) {
    place(card.querySelector("canvas"), best.attention_box);
    line.replaceChildren(...words(card, best.attention));
    line.setAttribute("role", "toolbar");
    line.ariaLabel = `${best.caption}: arrow keys move from word to word`;
    card.querySelector(".tip").hidden = false;
  } else {
    line.textContent = best.caption || NO_WORDS;
    line.removeAttribute("role");
    line.removeAttribute("aria-label");
    card.querySelector(".tip").hidden = true;
  }
  card.querySelector("img").alt = best.caption;
  captions.set(card, [file.name, found.model, best.caption, best.probability]);
  $("all").hidden = false;
  card.querySelector(".copy").hidden = false;
  // By what stands beside them. The model's own order, which its choice above is the first of, weighs length as well.
  const all = [best, ...best.alternatives].sort((a, b) => b.log_prob - a.log_prob);
  const most = Math.max(...all.map((one) => one.probability));
  const list = card.querySelector(".candidates");
  list.hidden = false;
  list.replaceChildren(
    ...all.map((one) => {
      const item = document.createElement("li");
      item.style.setProperty("--share", most > 0 ? one.probability / most : 0);
      item.classList.toggle("chosen", one === best);
      item.append(span("", one.caption || NO_WORDS), span("probability", percent(one)));
      return item;
    }),
  );
  card.querySelector(".facts").textContent =
    `${file.name} \u00b7 ${found.model} \u00b7 ${Math.round(found.timing.total_ms)} ms`;
  say(`${file.name}: ${best.caption}`);
}

async function copy(card) {
  const [, , caption] = captions.get(card);
  try {
    await navigator.clipboard.writeText(caption);
  } catch {
    // Browsers give the clipboard to pages of this machine and of HTTPS alone; of others a person copies what is marked.
    getSelection().selectAllChildren(card.querySelector(".caption"));
    say("The caption is selected.");
    return;
  }
  const button = card.querySelector(".copy");
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy caption"), 1500);
  say("Copied.");
}

// As spreadsheets read it: quoted, and with nothing in it that they would take for a formula.
function download() {
  const cell = (value) => {
    const text = String(value);
    const safe = typeof value === "string" && /^(\s*[=+\-@\uff0b\uff0d\uff1d\uff20]|[\t\r\n])/.test(text) ? `'${text}` : text;
    return `"${safe.replaceAll('"', '""')}"`;
  };
  const cards = [...$("results").children].filter((card) => captions.has(card));
  const rows = [["file", "model", "caption", "probability"], ...cards.map((card) => captions.get(card))];
  const text = rows.map((row) => row.map(cell).join(",")).join("\r\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", text, "\r\n"], { type: "text/csv" }));
  link.download = "captions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function fail(card, file, error) {
  const unreachable = error instanceof TypeError;
  const text = unreachable ? "The service does not answer: is it still running?" : error.message;
  card.querySelector(".caption").hidden = true;
  card.querySelector(".tip").hidden = true;
  card.querySelector(".candidates").hidden = true;
  const line = card.querySelector(".error");
  line.hidden = false;
  line.textContent = text[0].toUpperCase() + text.slice(1);
  card.querySelector(".again").hidden = false;
}

// One stop for the tab key; arrows move from word to word, Escape ends looking.
function words(card, attention) {
  const figure = card.querySelector("figure");
  const buttons = attention.map(({ word, weights }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "word";
    button.tabIndex = -1;
    button.ariaPressed = "false";
    button.textContent = word;
    const look = () => {
      for (const other of buttons) other.ariaPressed = String(other === button);
      paint(figure.querySelector("canvas"), weights);
      figure.classList.add("looking");
    };
    button.addEventListener("pointerenter", look);
    button.addEventListener("focus", look);
    button.addEventListener("click", look); // Safari does not focus buttons that are tapped
    button.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && document.activeElement !== button) rest();
    });
    button.addEventListener("blur", rest);
    return button;
  });
  function rest() {
    for (const button of buttons) button.ariaPressed = "false";
    figure.classList.remove("looking");
  }
  function move(from, to) {
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
  buttons[0].tabIndex = 0;
  for (const [position, button] of buttons.entries()) {
    button.addEventListener("keydown", (event) => {
      const last = buttons.length - 1;
      const to = {
        ArrowRight: Math.min(position + 1, last),
        ArrowLeft: Math.max(position - 1, 0),
        Home: 0,
        End: last,
      }[event.key];
      if (to !== undefined) {
        event.preventDefault();
        move(button, buttons[to]);
      } else if (event.key === "Escape") rest();
    });
  }
  return buttons.flatMap((button, position) => (position ? [" ", button] : [button]));
}

// Over what the model saw of the picture.
function place({ style }, [left, top, right, bottom]) {
  style.left = `${100 * left}%`;
  style.top = `${100 * top}%`;
  style.width = `${100 * (right - left)}%`;
  style.height = `${100 * (bottom - top)}%`;
}

// The grid, smoothly enlarged: bright where the weight is high. A model that looks everywhere alike shows an even veil.
function paint(canvas, weights) {
  const rows = weights.length;
  const columns = weights[0].length;
  const most = Math.max(...weights.flat());
  const small = new OffscreenCanvas(columns, rows);
  const pixels = new ImageData(columns, rows);
  weights.flat().forEach((weight, place) => {
    const share = most > 0 ? weight / most : 0;
    pixels.data.set([255, 120 + 120 * share, 40 * (1 - share), 225 * share], 4 * place);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  canvas.width = 32 * columns;
  canvas.height = 32 * rows;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function percent({ probability }) {
  if (probability >= 1e-5) return `${Number((100 * probability).toPrecision(2))} %`;
  const power = Math.floor(Math.log10(probability));
  if (!Number.isFinite(power)) return "0 %";
  const digits = [...String(-power)].map((digit) => "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[digit]);
  return `${(probability / 10 ** power).toFixed(1)} \u00d7 10\u207b${digits.join("")}`;
}

function span(kind, text) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = text;
  return element;
}

function say(text) {
  $("news").textContent = text;
}
