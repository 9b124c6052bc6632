// The page: labels a picture from a file, drag and drop, the clipboard or the camera.

import { pythonProcessor } from "./model/onnx/preprocessing.js";

const LONGEST_SIDE = 4096; // of the canvas, in pixels; some phones allow no more
const [target, file, invitation, picture, video, camera, dtype, status, answers] = [
  "target", "file", "invitation", "picture", "video", "camera", "dtype", "status", "answers",
].map((id) => document.getElementById(id));

let model = loadModel();
let latest = 0; // number of the latest picture; answers for earlier ones are not shown

// ---- The model ----

/** The transformers.js pipeline, in the precision chosen on the page. */
async function loadModel() {
  say("Loading the model …");
  try {
    const { env, pipeline, Tensor } = await import("@huggingface/transformers");
    env.allowLocalModels = true; // the page's own
    env.allowRemoteModels = false;
    env.useBrowserCache = false; // it would keep serving a model that the page has replaced
    const runtime = (ending) => import.meta.resolve(`onnxruntime-web/ort-wasm-simd-threaded.${ending}`);
    env.backends.onnx.wasm.wasmPaths = { mjs: runtime("mjs"), wasm: runtime("wasm") };
    const classify = await pipeline("image-classification", "./model", { dtype: dtype.value, device: "wasm" });
    classify.processor = pythonProcessor(classify.processor.image_processor.config, Tensor);
    if (!status.classList.contains("error")) say("Ready for a picture.");
    return classify;
  } catch (error) {
    say(`The model could not be loaded (${error.message}).`, true);
  }
}

async function classifyPicture() {
  const number = ++latest;
  answers.replaceChildren();
  say("Looking …");
  const classify = await model;
  if (!classify || number !== latest) return;
  say("Looking …");
  let labels;
  try {
    labels = await classify(picture, { top_k: 5 });
  } catch (error) {
    if (number === latest) say(`The model could not read the picture (${error.message}).`, true);
    return;
  }
  if (number !== latest) return;
  say("The model sees:");
  answers.replaceChildren(...labels.map(({ label, score }) => {
    const line = document.createElement("li");
    for (const text of [label, `${(100 * score).toFixed(1)} %`]) {
      line.appendChild(document.createElement("span")).textContent = text;
    }
    line.style.setProperty("--share", `${100 * score}%`);
    return line;
  }));
}

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

// ---- Pictures ----

/** Shows a picture, upright and only its first frame, and classifies it. `source`: a Blob, or a video that plays. */
async function take(source, name) {
  const number = ++latest;
  answers.replaceChildren();
  let bitmap;
  try {
    bitmap = await createImageBitmap(source);
  } catch {
    if (number === latest) {
      show(invitation);
      say(`${name} is not a picture that this browser can read. Try a JPEG or PNG file.`, true);
    }
    return;
  }
  if (number !== latest) return;
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  picture.width = Math.max(1, Math.round(scale * bitmap.width));
  picture.height = Math.max(1, Math.round(scale * bitmap.height));
  picture.classList.toggle("small", Math.max(picture.width, picture.height) < 128);
  const context = picture.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, picture.width, picture.height);
  show(picture);
  await classifyPicture();
}

/** Shows one of the three in the frame; the camera is only on while it is shown. */
function show(element) {
  for (const other of [invitation, picture, video]) other.hidden = other !== element;
  if (element !== video) stopCamera();
}

function stopCamera() {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
  camera.textContent = "Use the camera";
}

function takeFirst(files, otherwise) {
  if (files.length > 0) take(files[0], files[0].name);
  else say(otherwise, true);
}

file.addEventListener("change", () => {
  takeFirst(file.files, "No file was chosen.");
  file.value = ""; // so that the same file can be chosen again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  target.classList.add("over");
});
document.addEventListener("dragleave", () => target.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  target.classList.remove("over");
  takeFirst(event.dataTransfer.files, "That is not a file: save the picture first, then drop the file.");
});
document.addEventListener("paste", (event) => {
  takeFirst(event.clipboardData.files, "There is no picture on the clipboard.");
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", async () => take(await (await fetch(example.firstChild.src)).blob(), "The example"));
}
dtype.addEventListener("change", () => {
  model = loadModel();
  if (!picture.hidden) classifyPicture();
});

// ---- The camera ----

camera.hidden = !navigator.mediaDevices; // browsers only offer it over HTTPS and on localhost
camera.addEventListener("click", async () => {
  if (video.srcObject) return take(video, "The camera's picture");
  camera.disabled = true; // a second click would switch on a second stream, which nothing switches off
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    await video.play();
  } catch (error) {
    stopCamera();
    return say(`The camera cannot be used (${error.message}).`, true);
  } finally {
    camera.disabled = false;
  }
  latest++;
  answers.replaceChildren();
  say("The camera is on.");
  show(video);
  camera.textContent = "Take the picture";
});
