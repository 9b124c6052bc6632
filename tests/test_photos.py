"""`recipes/photos.yaml` on a folder of photos: both networks come pretrained on ImageNet."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from real_command import REPOSITORY, run
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, DeiTImageProcessor

from modeling_deit_ti.card import RunRecord
from modeling_deit_ti.parsing import parse_arguments


def test_the_recipe_names_models_on_the_hub():
    args = parse_arguments(["--config=recipes/photos.yaml", "--dataset_name=photos"])
    assert args.model.model_name_or_path == "facebook/deit-tiny-distilled-patch16-224"
    assert args.fitting.model.model_name_or_path == "tf_efficientnet_lite0.in1k" and args.teacher.teacher_pretrained
    assert args.fitting.training.num_train_epochs == 15


@pytest.mark.parametrize("mode", ["none", "hard", "both"])
def test_the_recipes_soft_targets_are_for_its_own_mode(mode):
    args = parse_arguments(["--config=recipes/photos.yaml", "--dataset_name=photos", f"--distill_mode={mode}"])
    assert args.training.mode.teacher_targets == {"none": None, "hard": "hard", "both": "soft"}[mode]


def test_two_pretrained_networks_learn_photos_of_mixed_sizes_and_formats(tmp_path, efficientnet_lite0):
    random = np.random.default_rng(0)
    for label, colour in {"lake": (20, 60, 200), "meadow": (30, 180, 40), "sunset": (230, 110, 30)}.items():
        for index in range(20):
            width, height = random.integers(60, 300, size=2)
            pixels = np.clip(random.normal(colour, 25, (height, width, 3)), 0, 255).astype("uint8")
            file = tmp_path / "photos" / label / f"{index}.{('jpg', 'png', 'webp')[index % 3]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    # Like facebook/deit-tiny-distilled-patch16-224, except for the weights.
    config = DeiTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "deit")
    DeiTImageProcessor().save_pretrained(tmp_path / "deit")
    names = {"dataset_name": "photos", "model_name_or_path": "deit", "teacher_model_name_or_path": efficientnet_lite0}
    short = {"num_train_epochs": 1, "teacher_num_train_epochs": 6, "teacher_image_size": 64, "disable_tqdm": True}
    short |= {"per_device_train_batch_size": 8}
    flags = {**names, **short, "output_dir": "run"}
    recipe = REPOSITORY / "recipes" / "photos.yaml"
    ended = run(f"--config={recipe}", *(f"--{name}={value}" for name, value in flags.items()), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "newly initialised: the source has different labels (1000 of them)" in ended.stdout
    record = RunRecord.load(tmp_path / "run")
    assert (record.base_model, record.teacher.fitted) == ("deit", "pretrained")
    assert record.dataset.label_names == ["lake", "meadow", "sunset"] and record.dataset.num_train_images == 54
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["teacher_accuracy"] > 0.6
    assert yaml.safe_load(recipe.read_text())["image_size"] == record.image_size
