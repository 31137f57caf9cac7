// The page: a picture at a place between four noises, and sixteen of other noises.
const CORNERS = 4, GRID = 16;
const size = facts.noise.reduce((a, b) => a * b);
const state = {label: facts.classes.length ? 0 : facts.noClass, seed: 0, x: 0, y: 0, first: null};
const spent = [];  // milliseconds of the last pictures
let session, wanted = null, drawing = false;

// Pixels (C, H, W) in [0, 1] of a noise (C, h, w) and a class.
async function generate(noise, label) {
  return oneAtATime(async () => {
    const start = performance.now();
    const given = {
      noise: new ort.Tensor("float32", noise, [1, ...facts.noise]),
      class_labels: new ort.Tensor("int64", BigInt64Array.of(BigInt(label)), [1]),
    };
    const pixels = (await session.run(given, ["images"])).images.data;
    spent.push(performance.now() - start);
    if (spent.length > 50) spent.shift();
    return pixels;
  });
}

function paint(canvas, pixels) {
  const [channels, height, width] = facts.image, picture = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] = Math.round(255 * pixels[(c % channels) * width * height + i]);
    picture.data[4 * i + 3] = 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// On the great circle between two noises, which keeps the norm of noise (Shoemake 1985).
function between(a, b, share) {
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) { ab += a[i] * b[i]; aa += a[i] * a[i]; bb += b[i] * b[i]; }
  const angle = Math.acos(Math.max(-1, Math.min(1, ab / Math.sqrt(aa * bb)))), sine = Math.sin(angle);
  const [of_a, of_b] = sine < 1e-6 ? [1 - share, share] : [Math.sin((1 - share) * angle) / sine, Math.sin(share * angle) / sine];
  return a.map((value, i) => of_a * value + of_b * b[i]);
}

const corner = i => i === 0 && state.first ? state.first : normalNumbers(size, state.seed, i);
function here() {
  const upper = between(corner(0), corner(1), state.x), lower = between(corner(2), corner(3), state.x);
  return between(upper, lower, state.y);
}
const className = label => label === facts.noClass ? "no class" : facts.classes[label];
const median = values => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

// Draws the newest request only: a drag makes more of them than there are pictures.
function show() {
  wanted = {...state};
  if (!drawing) drawing = drawWanted().catch(complain).finally(() => { drawing = false; });
}
async function drawWanted() {
  while (wanted) {
    const request = wanted;
    wanted = null;
    const pixels = await generate(here(), request.label);
    for (const canvas of [find("#picture"), find("#small")]) paint(canvas, pixels);
    const place = request.x || request.y ? `, place ${Math.round(100 * request.x)} | ${Math.round(100 * request.y)}` : "";
    const drawn = request.label === facts.noClass ? "no class" : `class ${className(request.label)}`;
    find("#caption").textContent = `${drawn}, noise ${request.seed}${request.first ? " (chosen)" : ""}${place}`;
    find("#status").textContent = `${median(spent).toFixed(1)} ms per picture, on one core`;
    await new Promise(requestAnimationFrame);  // input comes first
  }
}

function placeDot() {
  const pad = find("#pad"), percent = [state.x, state.y].map(share => Math.round(100 * share));
  find("#dot").style.left = `${14 + 0.72 * percent[0]}%`;
  find("#dot").style.top = `${14 + 0.72 * percent[1]}%`;
  pad.setAttribute("aria-valuenow", percent[0]);
  pad.setAttribute("aria-valuetext", `${percent[0]} % to the right, ${percent[1]} % down`);
}
function move(x, y) {
  state.x = Math.max(0, Math.min(1, x));
  state.y = Math.max(0, Math.min(1, y));
  placeDot();
  show();
}

let round = 0;
async function showAll() {
  const mine = ++round;
  show();
  const canvases = [...document.querySelectorAll("#pad canvas:not(#small), #grid canvas")];
  for (let i = 0; i < CORNERS + GRID && mine === round; i++) {
    paint(canvases[i], await generate(corner(i), state.label));
    if (i % 4 === 3) await new Promise(requestAnimationFrame);
  }
}

function build() {
  const labels = facts.classes.map((name, label) => label);
  for (const label of labels.length ? [...labels, facts.noClass] : []) {
    const choice = element("label", "", {class: "choice"}), input = element("input", "", {type: "radio", name: "class", value: label});
    input.checked = label === state.label;
    input.addEventListener("change", () => { state.label = label; showAll().catch(complain); });
    choice.append(input, element("span", className(label)));
    find("#classes .choices").append(choice);
  }
  find("#classes").hidden = !labels.length;
  for (let i = 0; i < GRID; i++) {
    const button = element("button", "", {"aria-label": `noise of picture ${i + 1} of ${GRID}`});
    button.append(element("canvas"));
    button.addEventListener("click", () => { state.first = corner(CORNERS + i); state.x = state.y = 0; placeDot(); showAll().catch(complain); });
    find("#grid").append(button);
  }
  const pad = find("#pad");
  const follow = event => {
    const box = pad.getBoundingClientRect(), side = 0.72 * box.width;
    move((event.clientX - box.left - 0.14 * box.width) / side, (event.clientY - box.top - 0.14 * box.width) / side);
  };
  pad.addEventListener("pointerdown", event => { pad.setPointerCapture(event.pointerId); follow(event); });
  pad.addEventListener("pointermove", event => { if (pad.hasPointerCapture(event.pointerId)) follow(event); });
  pad.addEventListener("keydown", event => {
    const step = event.shiftKey ? 0.2 : 0.05;
    const ways = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step], Home: [-1, -1], End: [1, 1]};
    if (!ways[event.key]) return;
    event.preventDefault();
    move(state.x + ways[event.key][0], state.y + ways[event.key][1]);
  });
  find("#new").addEventListener("click", () => {
    state.seed = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
    state.first = null;
    state.x = state.y = 0;
    placeDot();
    showAll().catch(complain);
  });
  find("#save").addEventListener("click", () => find("#picture").toBlob(blob => {
    const link = element("a", "", {href: URL.createObjectURL(blob), download: `${find("#caption").textContent.replace(/[^\p{L}\p{N}]+/gu, "-")}.png`});
    link.click();
    URL.revokeObjectURL(link.href);
  }));
  placeDot();
}

async function main() {
  build();
  session = await startSession(globalThis.packed.model);
  await generate(corner(0), state.label);  // the first pass prepares the others
  spent.length = 0;
  await showAll();
  for (const button of [find("#new"), find("#save")]) button.disabled = false;
  document.body.dataset.ready = "yes";
}
globalThis.page = {generate, between};  // for the console, too
main().catch(complain);
