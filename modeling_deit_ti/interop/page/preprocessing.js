// Prepares images for the model as its image processor does in Python. transformers.js's own code leaves resizing to
// the canvas in a browser and to sharp elsewhere, and neither smooths images that it shrinks.
//
//     const classify = await pipeline("image-classification", MODEL);
//     classify.processor = pythonProcessor(classify.processor.image_processor.config, Tensor);

/**
 * @param config the content of preprocessor_config.json
 * @param Tensor transformers.js's class
 * @returns a function from RawImages (`data`, `width`, `height`, `channels`) to `pixel_values` (N, 3, height, width)
 */
export function pythonProcessor(config, Tensor) {
  const { height, width } = config.crop_size;
  return async (images) => {
    const pixelValues = new Float32Array(images.length * 3 * height * width);
    images.forEach((image, index) => {
      const { data } = resizeAndCrop(image.rgb(), config.size.shortest_edge, height, width);
      for (let channel = 0; channel < 3; channel++) {
        const mean = config.image_mean[channel], std = config.image_std[channel];
        const start = (3 * index + channel) * height * width;
        for (let pixel = 0; pixel < height * width; pixel++) {
          pixelValues[start + pixel] = (data[3 * pixel + channel] * config.rescale_factor - mean) / std;
        }
      }
    });
    return { pixel_values: new Tensor("float32", pixelValues, [images.length, 3, height, width]) };
  };
}

/** Resizes the shorter edge of an RGB image, and crops the centre. */
export function resizeAndCrop(image, shortestEdge, height, width) {
  const { width: oldWidth, height: oldHeight } = image;
  const newLength = (length) => Math.floor((shortestEdge * length) / Math.min(oldWidth, oldHeight));
  const columns = centre(windows(oldWidth, newLength(oldWidth)), width);
  const rows = centre(windows(oldHeight, newLength(oldHeight)), height);
  return resizeAndTranspose(resizeAndTranspose(image, columns), rows);
}

function centre(items, length) {
  const start = Math.floor((items.length - length) / 2);
  return items.slice(start, start + length);
}

/** For each pixel of the new length: the first of the old pixels that it is made from, and their weights. */
function windows(oldLength, newLength) {
  const scale = oldLength / newLength;
  const blur = Math.max(scale, 1); // images are smoothed when they shrink
  return Array.from({ length: newLength }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const start = Math.max(Math.floor(centre - 2 * blur + 0.5), 0);
    const end = Math.min(Math.floor(centre + 2 * blur + 0.5), oldLength);
    const weights = Array.from({ length: end - start }, (_, i) => cubic((start + i + 0.5 - centre) / blur));
    const sum = weights.reduce((a, b) => a + b);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/** Keys' cubic convolution kernel with a = -0.5, the bicubic filter of Pillow and torchvision. */
function cubic(x) {
  const a = -0.5, d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? ((d - 5) * d + 8) * d * a - 4 * a : 0;
}

/** Resizes the rows of an RGB image and turns them into columns; a second call turns them back into rows. */
function resizeAndTranspose({ data, width, height }, windows) {
  const resized = new Uint8ClampedArray(windows.length * height * 3); // it rounds what is assigned
  for (let y = 0; y < height; y++) {
    windows.forEach(({ start, weights }, x) => {
      let red = 0, green = 0, blue = 0;
      for (let i = 0, from = 3 * (y * width + start); i < weights.length; i++, from += 3) {
        red += weights[i] * data[from];
        green += weights[i] * data[from + 1];
        blue += weights[i] * data[from + 2];
      }
      const to = 3 * (x * height + y);
      resized[to] = red;
      resized[to + 1] = green;
      resized[to + 2] = blue;
    });
  }
  return { data: resized, width: height, height: windows.length };
}
