// What the pages share: packed files, the network, and numbers that a seed decides.
const find = selector => document.querySelector(selector);
const facts = JSON.parse(find("#facts").textContent);

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// The inverse of hf_dpssl/pages/packed_bytes.py: seven bits a character, gzip, and numbers that are stored by planes.
async function unpacked({ranges, size, data}) {
  const bytes = new Uint8Array(size);
  for (let i = 0, from = 0, held = 0, bits = 0; i < size; bits -= 8) {
    for (; bits < 8; bits += 7) held = ((held << 7) | data.charCodeAt(from++)) & 0xffff;
    bytes[i++] = held >> (bits - 8);
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const all = new Uint8Array(await new Response(stream).arrayBuffer());
  for (const [start, count] of ranges) {
    const planes = all.slice(start, start + 4 * count);
    for (let i = 0; i < count; i++) for (let p = 0; p < 4; p++) all[start + 4 * i + p] = planes[p * count + i];
  }
  return all;
}

const numbersOf = bytes => new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);

// All is in the page, so that it works from a disk, too: the module and the binary get addresses within the page.
async function startSession(model) {
  const {module, binary} = globalThis.packed;
  const address = (content, type) => URL.createObjectURL(new Blob([content], {type}));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = {
    mjs: address(await unpacked(module), "text/javascript"),
    wasm: address(await unpacked(binary), "application/wasm"),
  };
  const session = await ort.InferenceSession.create(await unpacked(model), {executionProviders: ["wasm"]});
  for (const one of Object.values(ort.env.wasm.wasmPaths)) URL.revokeObjectURL(one);
  globalThis.packed = null;  // some megabytes of text
  return session;
}

// A session computes one thing at a time.
let last = Promise.resolve();
function oneAtATime(work) {
  const result = last.then(work);
  last = result.catch(() => {});
  return result;
}

// Standard normal numbers that two whole numbers decide (mulberry32, Box-Muller).
function normalNumbers(count, seed, index) {
  let state = (Math.imul(seed, 0x9e3779b1) ^ Math.imul(index + 1, 0x85ebca6b)) | 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
  const numbers = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    numbers[i] = Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  }
  return numbers;
}

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function complain(error) {
  find("[role=alert]").textContent = error.message ?? String(error);
  find("#status").textContent = "";
  console.warn(error);
}
