"""How each contender of throughput.py trains: ours, timm's, transformers', the published baseline's, and a bare step.

All take the images, the recipe, the precision and the teacher from the same arguments, parsed as train_hf.py does.
"""

from collections.abc import Callable

import timm
import torch
from datasets import Dataset
from timm.data import create_loader
from timm.data.mixup import FastCollateMixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import TokenDistillationTask
from timm.utils import NativeScaler, dispatch_clip_grad
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import v2
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from benchmarks.setting import BARE, BASELINE_SIZES, DTYPES, OURS, PUBLISHED_BASELINE, TIMM, TRANSFORMERS
from benchmarks.step_clock import StepClock
from modeling_deit_ti.arguments import Arguments
from modeling_deit_ti.classifiers import label_maps
from modeling_deit_ti.data import ImageData
from modeling_deit_ti.data.decoding import read_image
from modeling_deit_ti.data.inputs import make_image_processor, make_train_transform
from modeling_deit_ti.distillation import distillation_loss
from modeling_deit_ti.fitting import prepare_teacher
from modeling_deit_ti.runs import build_network, build_trainer


# What a plain Trainer takes over from our arguments.
OF_ANY_TRAINER = (
    *("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "weight_decay", "max_grad_norm"),
    *("label_smoothing_factor", "fp16", "bf16", "use_cpu", "torch_compile", "dataloader_num_workers"),
    *("dataloader_pin_memory", "logging_strategy", "save_strategy", "report_to", "disable_tqdm"),
)


def autocast(args: Arguments) -> torch.autocast:
    dtype = DTYPES.get(args.training.mixed_precision)  # none in float32
    return torch.autocast(args.training.device.type, dtype, enabled=dtype is not None)


def load_teacher(args: Arguments):
    return AutoModelForImageClassification.from_pretrained(args.teacher.teacher_model_name_or_path).eval()


# ---- Ours ----


def train_ours(args: Arguments, data: ImageData, clock: StepClock) -> None:
    image_processor = make_image_processor(args.model, args.augmentation)
    student, _ = build_network(args, data, image_processor)
    teacher, _, _ = prepare_teacher(args, data, image_processor)
    trainer = build_trainer(args, data, student, image_processor, teacher)
    clock.watch(student, teacher)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train_bare(args: Arguments, data: ImageData, clock: StepClock) -> None:
    """The two networks of our trainer on one synthetic batch: no data, no logging, nothing else."""
    training, device, size = args.training, args.training.device, args.model.image_size
    smoothing = training.label_smoothing_factor
    image_processor = make_image_processor(args.model, args.augmentation)
    student, _ = build_network(args, data, image_processor)
    student.to(device).train()
    teacher, _, _ = prepare_teacher(args, data, image_processor)
    teacher.to(device, DTYPES.get(training.mixed_precision, torch.float32))
    clock.watch(student, teacher)
    network = torch.compile(student) if training.torch_compile else student
    rates = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    optimizer = torch.optim.AdamW(student.parameters(), **rates, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=training.fp16)
    images = torch.randn(training.train_batch_size, 3, size, size, device=device)
    image_labels = torch.randint(len(data.label_names), (training.train_batch_size,), device=device)
    for pixel_values, labels in clock.batches([(images, image_labels)]):
        with autocast(args):
            teacher_logits = teacher(pixel_values)
            outputs = network(pixel_values=pixel_values)
            logits = (outputs["class_logits"], outputs["distillation_logits"])
            loss = distillation_loss(training.mode, *logits, labels, teacher_logits, smoothing).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), training.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


# ---- timm ----


class PilImages(torch.utils.data.Dataset):
    """Rows of `datasets` in the form of timm's and torchvision's: (image, label), with the attribute `transform`."""

    def __init__(self, dataset: Dataset, transform: Callable | None = None):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.dataset[index]
        return self.transform(read_image(row)), row["label"]


def train_timm(args: Arguments, data: ImageData, clock: StepClock) -> None:
    """timm's loader, model, task, optimizer and loss scaler, in the loop of its train.py."""
    training, augmentation, size = args.training, args.augmentation, args.model.image_size
    num_labels, smoothing = len(data.label_names), training.label_smoothing_factor
    alphas = augmentation.mixup, augmentation.cutmix
    collate = FastCollateMixup(*alphas, label_smoothing=smoothing, num_classes=num_labels) if any(alphas) else None
    images = PilImages(data.train)
    loader = create_loader(
        images,
        input_size=(3, size, size),
        batch_size=training.train_batch_size,
        is_training=True,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
        hflip=augmentation.horizontal_flip,
        color_jitter=None,
        auto_augment=None if augmentation.auto_augment == "none" else augmentation.auto_augment,
        interpolation="bicubic",
        num_workers=training.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=training.dataloader_pin_memory,
        device=training.device,
    )
    if augmentation.crop_at(size) == "padded":  # as DeiT's code does, to what timm's factory has made
        resize = transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)
        images.transform.transforms[0] = transforms.Compose([resize, transforms.RandomCrop(size, padding=size // 8)])
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=num_labels,
        img_size=size,
        patch_size=args.model.patch_size,
        drop_path_rate=args.model.drop_path_rate,
    ).to(training.device)
    task = TokenDistillationTask(
        student,
        load_teacher(args).timm_model.to(training.device),
        criterion=SoftTargetCrossEntropy() if any(alphas) else LabelSmoothingCrossEntropy(smoothing),
        distill_type="hard",
        task_loss_weight=1 - training.mode.alpha,
        device=training.device,
    )
    clock.watch(student, task.teacher)
    rates = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    optimizer = create_optimizer_v2(student, opt="adamw", **rates)
    scaler = NativeScaler(device=training.device.type) if training.fp16 else None
    task.train()
    if training.torch_compile:
        task.compile()
    for pixel_values, labels in clock.batches(loader):
        with autocast(args):
            loss = task(pixel_values, labels)["loss"]
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=training.max_grad_norm, parameters=student.parameters())
        else:
            loss.backward()
            dispatch_clip_grad(student.parameters(), training.max_grad_norm)
            optimizer.step()
        optimizer.zero_grad()


# ---- transformers ----


class GuideTrainer(Trainer):
    """The trainer of transformers' guide "Knowledge Distillation for Computer Vision", with DeiT's two-headed loss."""

    def __init__(self, teacher, alpha: float, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher.to(self.args.device)
        self.alpha = alpha

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            teacher_labels = self.teacher(pixel_values=inputs["pixel_values"]).logits.argmax(dim=-1)
        smoothing = self.args.label_smoothing_factor
        label_loss = F.cross_entropy(outputs.cls_logits, inputs["labels"], label_smoothing=smoothing)
        teacher_loss = F.cross_entropy(outputs.distillation_logits, teacher_labels)
        loss = (1 - self.alpha) * label_loss + self.alpha * teacher_loss
        return (loss, outputs) if return_outputs else loss


def train_transformers(args: Arguments, data: ImageData, clock: StepClock) -> None:
    """transformers' DeiT in a plain Trainer, `datasets.with_transform` image by image, torchvision's mixing."""
    augmentation, num_labels = args.augmentation, len(data.label_names)
    transform = make_train_transform(augmentation, make_image_processor(args.model, augmentation))
    alphas = ((v2.MixUp, augmentation.mixup), (v2.CutMix, augmentation.cutmix))
    mixes = [kind(alpha=alpha, num_classes=num_labels) for kind, alpha in alphas if alpha > 0]
    mix = v2.RandomChoice(mixes) if mixes else v2.Identity()

    def preprocess(columns: dict) -> dict:
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return {"pixel_values": [transform(read_image(row)) for row in rows], "label": columns["label"]}

    def collate(samples: list[dict]) -> dict:
        batch = default_collate(samples)
        pixel_values, labels = mix(batch["pixel_values"], batch["label"])
        return {"pixel_values": pixel_values, "labels": labels}

    tiny = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    sizes = {"image_size": args.model.image_size, "patch_size": args.model.patch_size}
    config = DeiTConfig(**tiny, **sizes, **label_maps(data.label_names))
    flags = {name: getattr(args.training, name) for name in OF_ANY_TRAINER}
    trainer = GuideTrainer(
        load_teacher(args),
        args.training.mode.alpha,
        model=DeiTForImageClassificationWithTeacher(config),
        args=TrainingArguments(dataloader_drop_last=True, remove_unused_columns=False, **flags),
        train_dataset=data.train.with_transform(preprocess),
        data_collator=collate,
    )
    clock.watch(trainer.model, trainer.teacher)
    trainer.add_callback(clock)
    trainer.train()


# ---- The published baseline ----


def train_as_the_published_baseline(args: Arguments, data: ImageData, clock: StepClock) -> None:
    """A notebook's loop: 224x224, images transformed one by one in this process, fp32, the loss read every step."""
    training, device = args.training, args.training.device
    image_processor = make_image_processor(args.model, args.augmentation)
    resize = transforms.Resize((args.model.image_size, args.model.image_size))
    normalize = transforms.Normalize(image_processor.image_mean, image_processor.image_std)
    images = PilImages(data.train, transforms.Compose([resize, transforms.ToTensor(), normalize]))
    loader = torch.utils.data.DataLoader(images, training.train_batch_size, shuffle=True, drop_last=True)
    student, _ = build_network(args, data, image_processor)
    student.to(device).train()
    teacher = load_teacher(args).timm_model.to(device)
    clock.watch(student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=training.learning_rate)
    running_loss = 0.0
    for pixel_values, labels in clock.batches(loader):
        pixel_values, labels = pixel_values.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = student(pixel_values=pixel_values)
        with torch.no_grad():
            teacher_logits = teacher(pixel_values)
        logits = (outputs["class_logits"], outputs["distillation_logits"])
        loss = distillation_loss(training.mode, *logits, labels, teacher_logits).loss
        loss.backward()
        optimizer.step()
        running_loss += loss.item()


# How each trains, and what its flags add to those of all.
CONTENDERS: dict[str, tuple[Callable[[Arguments, ImageData, StepClock], None], dict]] = {
    BARE: (train_bare, {}),
    OURS[0]: (train_ours, {"augment_on": "loader"}),
    OURS[1]: (train_ours, {"augment_on": "device"}),
    TIMM: (train_timm, {}),
    TRANSFORMERS: (train_transformers, {}),
    PUBLISHED_BASELINE: (train_as_the_published_baseline, BASELINE_SIZES),
}
