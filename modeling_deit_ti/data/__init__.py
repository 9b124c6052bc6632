"""Datasets in, `pixel_values` and `labels` out.

Any source is checked and brought into one form (loading.py; streaming.py for data larger than disk and memory), which
inputs.py turns into the model's inputs.
"""

from ..arguments import ImageArguments
from .loading import EvaluationData, ImageData, load_evaluation_images, load_stored_images
from .sources import storing_in_cache
from .streaming import load_streamed_images


@storing_in_cache()
def load_images(args: ImageArguments, labels_needed: bool = True) -> ImageData:
    """
    Loads and checks the images. Unless `labels_needed`, the training split may lack labels.

    Raises:
        UserError: if the dataset is neither on disk nor reachable, lacks a column, has labels that are missing, out of
            range or different between its splits, or holds an image that cannot be decoded.
    """
    return (load_streamed_images if args.streaming else load_stored_images)(args, labels_needed)


__all__ = ["EvaluationData", "ImageData", "load_evaluation_images", "load_images"]
