// node classify.js MODEL IMAGE...: prints as JSON what transformers.js predicts for the images in each precision, with
// its own preprocessing and with ours. MODEL is a folder or, with HF_ENDPOINT and HF_HOME, a repository on that Hub.

import { env, pipeline, RawImage, Tensor } from "@huggingface/transformers";
import { pythonProcessor } from "../modeling_deit_ti/interop/page/preprocessing.js";

const [model, ...images] = process.argv.slice(2);
if (process.env.HF_ENDPOINT) {
  env.remoteHost = process.env.HF_ENDPOINT;
  env.remotePathTemplate = "{model}/resolve/{revision}/transformers/";
  env.cacheDir = process.env.HF_HOME;
}
const answers = [];
for (const precision of ["fp32", "q8"]) {
  const classify = await pipeline("image-classification", model, { dtype: precision });
  const processors = {
    theirs: classify.processor,
    ours: pythonProcessor(classify.processor.image_processor.config, Tensor),
  };
  for (const [preprocessing, processor] of Object.entries(processors)) {
    classify.processor = processor;
    for (const image of images) {
      const { logits } = await classify.model(await processor([await RawImage.read(image)]));
      const [{ label }] = await classify(image);
      answers.push({ precision, preprocessing, image, label, logits: [...logits.data] });
    }
  }
}
console.log(JSON.stringify(answers));
