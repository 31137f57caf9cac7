// The page: a picture, its vector by the encoder, and the pictures whose vectors are nearest by cosine.
const SHOWN = 12, MAX_BYTES = 20 * 2 ** 20, MAX_PIXELS = 16e6;
const sheet = new Image();
let session, vectors;

// As Python rounds: a half goes to the even number.
const roundEven = x => { const low = Math.floor(x), rest = x - low; return rest === 0.5 ? low + low % 2 : Math.round(x); };

const sinc = x => x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
const FILTERS = {  // half width, and weight at a distance
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, x => { x = Math.abs(x); return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0; }],
  lanczos: [3, x => Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0],
};

// Lines of `from` pixels become lines of `to`, with the filter widened where they get shorter (against aliasing), in the
// fixed point of Pillow's Resample.c, so that every byte is the same: 22 bits after the point.
function coefficients(from, to, [half, weight]) {
  const scale = from / to, wide = Math.max(scale, 1), reach = half * wide, found = [];
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5)), end = Math.min(from, Math.trunc(centre + reach + 0.5));
    const weights = Array.from({length: end - first}, (_, j) => weight((j + first - centre + 0.5) / wide));
    const sum = weights.reduce((a, b) => a + b, 0);
    found.push([first, weights.map(one => Math.trunc(one / sum * 2 ** 22 + (one < 0 ? -0.5 : 0.5)))]);
  }
  return found;
}

// Bytes (height, width, 3) to (newHeight, newWidth, 3): rows first, then columns, as Pillow does.
function resample({data, width, height}, newWidth, newHeight, filter) {
  const byte = sum => Math.max(0, Math.min(255, sum >> 22));
  if (newWidth !== width) {
    const next = new Uint8Array(newWidth * height * 3);
    coefficients(width, newWidth, filter).forEach(([first, weights], x) => {
      for (let y = 0; y < height; y++) for (let c = 0; c < 3; c++) {
        let sum = 1 << 21;
        for (let j = 0; j < weights.length; j++) sum += data[3 * (y * width + first + j) + c] * weights[j];
        next[3 * (y * newWidth + x) + c] = byte(sum);
      }
    });
    [data, width] = [next, newWidth];
  }
  if (newHeight !== height) {
    const next = new Uint8Array(width * newHeight * 3);
    coefficients(height, newHeight, filter).forEach(([first, weights], y) => {
      for (let x = 0; x < 3 * width; x++) {
        let sum = 1 << 21;
        for (let j = 0; j < weights.length; j++) sum += data[3 * width * (first + j) + x] * weights[j];
        next[3 * width * y + x] = byte(sum);
      }
    });
    [data, height] = [next, newHeight];
  }
  return {data, width, height};
}

// What the encoder's image processor makes of RGB bytes: shorter side resized, centred square, normalised (3, S, S).
function prepare(picture) {
  const {size, resize, rounds, filter, mean, std} = facts.input, short = Math.min(picture.width, picture.height);
  const side = length => rounds ? Math.max(resize, roundEven(length * (resize / short))) : Math.trunc(resize * length / short);
  const sides = short === resize ? [picture.width, picture.height] : [side(picture.width), side(picture.height)];
  const {data, width, height} = resample(picture, ...sides, FILTERS[filter]);
  const offset = length => rounds ? Math.floor((length - size) / 2) : roundEven((length - size) / 2);
  const left = offset(width), top = offset(height), values = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++) for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) {
    const byte = data[3 * ((top + y) * width + left + x) + c];
    values[(c * size + y) * size + x] = (Math.fround(byte / 255) - mean[c]) / std[c];
  }
  return values;
}

// RGB bytes of a file, over white where it is transparent; colours as they are in the file.
async function pixelsOf(blob) {
  if (blob.size > MAX_BYTES) throw new Error(`The file has ${(blob.size / 2 ** 20).toFixed(1)} MiB; at most ${MAX_BYTES / 2 ** 20} are read.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, {colorSpaceConversion: "none"});
  } catch {
    throw new Error("This is no picture that the browser can read: choose a PNG, JPEG or WebP file.");
  }
  const {width, height} = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`The picture has ${width} x ${height} pixels; at most ${MAX_PIXELS / 1e6} megapixels are read.`);
  const canvas = new OffscreenCanvas(width, height), pen = canvas.getContext("2d", {willReadFrequently: true});
  pen.fillStyle = "white";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0);
  const rgba = pen.getImageData(0, 0, width, height).data, data = new Uint8Array(3 * width * height);
  for (let i = 0; i < width * height; i++) for (let c = 0; c < 3; c++) data[3 * i + c] = rgba[4 * i + c];
  return {data, width, height};
}

// The unit vector of a picture.
async function embed(values) {
  const side = facts.input.size;
  const given = {pixel_values: new ort.Tensor("float32", values, [1, 3, side, side])};
  const features = (await oneAtATime(() => session.run(given))).features.data;
  const norm = Math.sqrt(features.reduce((sum, value) => sum + value * value, 0)) || 1;
  return features.map(value => value / norm);
}

// [index, cosine] of the nearest pictures, best first.
function nearest(vector, count) {
  const cosines = facts.captions.map((_, i) => {
    let sum = 0;
    for (let d = 0; d < facts.dimension; d++) sum += vector[d] * vectors[i * facts.dimension + d];
    return [i, sum];
  });
  return cosines.sort((a, b) => b[1] - a[1]).slice(0, count);
}

function thumbnail(index) {
  const {side, columns} = facts.thumbnails, canvas = element("canvas", "", {width: side, height: side, "aria-hidden": "true"});
  canvas.getContext("2d").drawImage(sheet, index % columns * side, Math.floor(index / columns) * side, side, side, 0, 0, side, side);
  return canvas;
}

async function explore(blob) {
  find("[role=alert]").textContent = "";
  const start = performance.now();
  const picture = await pixelsOf(blob), values = prepare(picture), found = nearest(await embed(values), SHOWN);
  const spent = performance.now() - start;
  if (find("#shown").src) URL.revokeObjectURL(find("#shown").src);
  find("#shown").src = URL.createObjectURL(blob);
  find("#neighbours").replaceChildren(...found.map(([index, cosine]) => {
    const figure = element("figure");
    figure.append(thumbnail(index), element("figcaption", `${facts.captions[index]} · ${cosine.toFixed(3)}`));
    return figure;
  }));
  find("#status").textContent = `Among ${facts.captions.length} pictures, with cosine; ${spent.toFixed(1)} ms, on one core`;
}

const exampleBlob = example => new Blob([bytesOf(example.picture.split(",")[1])], {type: "image/png"});
const tell = promise => promise.catch(complain);

function build() {
  facts.examples.forEach((example, i) => {
    const button = element("button", "", {"aria-label": `example ${i + 1}: ${example.caption}`});
    button.append(element("img", "", {src: example.picture, alt: ""}));
    button.addEventListener("click", () => tell(explore(exampleBlob(example))));
    find("#examples").append(button);
  });
  const drop = find("#drop"), file = find("#file");
  file.addEventListener("change", () => { if (file.files.length) tell(explore(file.files[0])); file.value = ""; });
  addEventListener("dragover", event => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", () => drop.classList.remove("over"));
  addEventListener("drop", event => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) tell(explore(event.dataTransfer.files[0]));
  });
  addEventListener("paste", event => { if (event.clipboardData.files.length) tell(explore(event.clipboardData.files[0])); });
}

async function main() {
  const {model, vectors: packedVectors} = globalThis.packed;
  vectors = numbersOf(await unpacked(packedVectors));
  sheet.src = facts.thumbnails.sheet;
  await sheet.decode();
  session = await startSession(model);
  build();
  find("#file").disabled = false;
  await embed(new Float32Array(3 * facts.input.size ** 2));  // the first pass prepares the others
  await explore(exampleBlob(facts.examples[0]));
  document.body.dataset.ready = "yes";
}
globalThis.page = {facts, pixelsOf, prepare, embed, nearest, explore};  // for the console, too
main().catch(complain);
