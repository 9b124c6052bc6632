"""How each contender trains: ours, timm, transformers, the published baseline and a bare step.

Each takes train_hf.py's arguments. In time_to_accuracy.py, timm and transformers use their own defaults.
"""

import itertools
from collections.abc import Callable, Iterable

import timm
import torch
from datasets import Dataset
from timm.data import create_loader
from timm.data.mixup import FastCollateMixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TokenDistillationTask
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.transforms import v2
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PrinterCallback,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

from benchmarks.setting import Precision, Setting
from benchmarks.step_clock import Clock
from modeling_deit_ti.arguments import Arguments
from modeling_deit_ti.classifiers import input_format, label_maps
from modeling_deit_ti.data import ImageData
from modeling_deit_ti.data.decoding import read_image
from modeling_deit_ti.data.inputs import EvalImages, make_image_processor, make_train_transform
from modeling_deit_ti.device import autocast
from modeling_deit_ti.distillation import MODES, distillation_loss
from modeling_deit_ti.fitting import prepare_teacher
from modeling_deit_ti.parsing import parse_arguments
from modeling_deit_ti.runs import build_network, build_trainer
from modeling_deit_ti.teacher_cache import make_teacher_cache
from modeling_deit_ti.trainer import DistillationTrainer


Train = Callable[[Arguments, ImageData, Clock], None]


def make_arguments(setting: Setting, work_dir: str, precision: Precision | None = None, **flags) -> Arguments:
    """A contender's arguments, from train_hf.py's flags; `flags` override those that all contenders share."""
    shared = {name: getattr(setting, name) for name in ("dataset_name", "image_size", "patch_size")}
    shared |= {"output_dir": f"{work_dir}/run", "teacher_output_dir": f"{work_dir}/teachers"}
    shared |= {"use_cpu": setting.device == "cpu", "disable_tqdm": True}
    shared |= {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    if precision is not None:
        shared |= {name: precision == name for name in ("fp16", "bf16")}
    return parse_arguments([f"--{name}={value}" for name, value in (shared | flags).items()])


def eval_batches(images: EvalImages, batch_size: int) -> DataLoader:
    """Batches with their own random generator, so that evaluation does not affect the training."""
    return DataLoader(images, batch_size, collate_fn=dict, generator=torch.Generator())


def load_teacher(args: Arguments) -> TimmWrapperForImageClassification:
    """The teacher as it was saved."""
    return AutoModelForImageClassification.from_pretrained(args.teacher.teacher_model_name_or_path).eval()


class ResizedImages(nn.Module):
    """A classifier that resizes images to its own size, as a user of timm or transformers has to write it."""

    def __init__(self, classifier: nn.Module, image_size: int):
        super().__init__()
        self.classifier, self.image_size = classifier, image_size

    def forward(self, pixel_values: torch.Tensor):
        size = (self.image_size, self.image_size)
        return self.classifier(F.interpolate(pixel_values, size, mode="bicubic", antialias=True))


def load_peers_teacher(args: Arguments, as_timm_model: bool = False) -> nn.Module:
    """The teacher as a transformers or timm model, with the student's images resized to its own size."""
    teacher = load_teacher(args)
    name = args.teacher.teacher_model_name_or_path
    image_size, *_ = input_format(teacher.config, name, "--teacher_model_name_or_path")
    classifier = teacher.timm_model if as_timm_model else teacher
    return classifier if image_size == args.model.image_size else ResizedImages(classifier, image_size)


# ---- Ours ----


def make_our_trainer(args: Arguments, data: ImageData, with_cache: bool = True) -> DistillationTrainer:
    """Our trainer, as train_hf.py builds it."""
    student, image_processor, _ = build_network(args, data)
    teacher, _, _ = prepare_teacher(args, data, image_processor)
    cache = make_teacher_cache(args, teacher, data, image_processor) if with_cache else None
    return build_trainer(args, data, student, image_processor, teacher, cache)


def train_with_clock(trainer: Trainer, clock: Clock) -> None:
    clock.watch(trainer.model, trainer.teacher)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train_ours(args: Arguments, data: ImageData, clock: Clock) -> None:
    train_with_clock(make_our_trainer(args, data), clock)


def train_bare(args: Arguments, data: ImageData, clock: Clock) -> None:
    """
    Our trainer's networks and optimizer, as it has prepared them (precision, attention, memory layout, compilation),
    on one synthetic batch: no data loading, no logging, nothing else.
    """
    training, device, size = args.training, args.training.device, args.model.image_size
    trainer = make_our_trainer(args, data, with_cache=False)
    student, teacher, optimizer = trainer.model.train(), trainer.training_teacher, trainer.create_optimizer()
    clock.watch(student, trainer.teacher)
    options = trainer.accelerator.state.dynamo_plugin.to_kwargs()
    network = torch.compile(student, **options) if training.torch_compile else student
    scaler = torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16")
    images = torch.randn(training.train_batch_size, 3, size, size, device=device)
    image_labels = torch.randint(len(data.label_names), (training.train_batch_size,), device=device)
    for pixel_values, labels in clock.batches(itertools.repeat((images, image_labels))):
        teacher_logits = teacher(pixel_values)
        with autocast(args.training.device, args.training.mixed_precision):
            outputs = network(pixel_values=pixel_values)
        logits = (outputs["class_logits"].float(), outputs["distillation_logits"].float())
        smoothing = training.label_smoothing_factor
        loss = distillation_loss(training.mode, *logits, labels, teacher_logits, smoothing).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), training.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


# ---- timm ----


class PilImages(torch.utils.data.Dataset):
    """Rows of `datasets` in the form that timm and torchvision use: (image, label), with an attribute `transform`."""

    def __init__(self, dataset: Dataset, transform: Callable | None = None):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.dataset[index]
        return self.transform(read_image(row)), row["label"]


def timm_loader(images: PilImages, args: Arguments, num_labels: int, **options) -> Iterable:
    """timm's loader, with the augmentation in `args`; `options` are arguments of its factory that `args` lacks."""
    training, augmentation, size = args.training, args.augmentation, args.model.image_size
    alphas, smoothing = (augmentation.mixup, augmentation.cutmix), training.label_smoothing_factor
    collate = FastCollateMixup(*alphas, label_smoothing=smoothing, num_classes=num_labels) if any(alphas) else None
    loader = create_loader(
        images,
        input_size=(3, size, size),
        batch_size=training.train_batch_size,
        is_training=True,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
        hflip=augmentation.horizontal_flip,
        auto_augment=None if augmentation.auto_augment == "none" else augmentation.auto_augment,
        num_workers=training.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=training.dataloader_pin_memory,
        device=training.device,
        **options,
    )
    if augmentation.crop_at(size) == "padded":  # as DeiT's code does, in the transform from timm's factory
        resize = transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)
        images.transform.transforms[0] = transforms.Compose([resize, transforms.RandomCrop(size, padding=size // 8)])
    return loader


def train_timm(args: Arguments, data: ImageData, clock: Clock, own_defaults: bool = False) -> None:
    """
    timm's loader, model, task, optimizer and loss scaler, in the loop of its train.py. With `own_defaults`, whatever
    has no flag here follows that script's defaults: the optimizer, its schedule, the losses and some augmentation.
    """
    training, num_labels, smoothing = args.training, len(data.label_names), args.training.label_smoothing_factor
    if own_defaults:
        loader_options = {"color_jitter": 0.4, "interpolation": "random"}
        loss_options = {"distill_type": "soft", "temperature": 4.0}  # both weights are 1
        optimizer_options = {"opt": "sgd", "momentum": 0.9}
    else:
        loader_options = {"color_jitter": None, "interpolation": "bicubic"}
        loss_options = {"distill_type": "hard", "task_loss_weight": 1 - training.mode.alpha}
        optimizer_options = {"opt": "adamw"}
    is_mixed = args.augmentation.mixup > 0 or args.augmentation.cutmix > 0
    loader = timm_loader(PilImages(data.train), args, num_labels, **loader_options)
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=num_labels,
        img_size=args.model.image_size,
        patch_size=args.model.patch_size,
        drop_path_rate=args.model.drop_path_rate,
    ).to(training.device)
    task = TokenDistillationTask(
        student,
        load_peers_teacher(args, as_timm_model=True).to(training.device),
        criterion=SoftTargetCrossEntropy() if is_mixed else LabelSmoothingCrossEntropy(smoothing),
        device=training.device,
        **loss_options,
    )
    clock.watch(student, task.teacher)
    rates = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    optimizer = create_optimizer_v2(student, **optimizer_options, **rates)
    scheduler, epochs = None, itertools.count()
    if own_defaults:
        schedule = {"warmup_epochs": 5, "warmup_lr": 1e-5, "min_lr": 0.0, "cooldown_epochs": 0}
        num_epochs = int(training.num_train_epochs)
        scheduler, num_epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=num_epochs, **schedule)
        epochs = range(num_epochs)
    scaler = NativeScaler(device=training.device.type) if training.mixed_precision == "fp16" else None
    clip_grad = training.max_grad_norm or None
    task.train()
    if training.torch_compile:
        task.compile()
    for epoch in epochs:
        for pixel_values, labels in clock.batches(loader):
            with autocast(args.training.device, args.training.mixed_precision):
                loss = task(pixel_values, labels)["loss"]
            if scaler is not None:
                scaler(loss, optimizer, clip_grad=clip_grad, parameters=student.parameters())
            else:
                loss.backward()
                if clip_grad is not None:
                    dispatch_clip_grad(student.parameters(), clip_grad)
                optimizer.step()
            optimizer.zero_grad()
        if clock.is_done:
            return
        if scheduler is not None:
            scheduler.step(epoch + 1)


# ---- transformers ----


class GuideTrainer(Trainer):
    """The trainer from transformers' guide "Knowledge Distillation for Computer Vision"."""

    temperature, lambda_param = 5, 0.5

    def __init__(self, teacher, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            teacher_logits = self.teacher(pixel_values=inputs["pixel_values"]).logits
        loss = self.distillation_loss(outputs, inputs["labels"], teacher_logits)
        return (loss, outputs) if return_outputs else loss

    def distillation_loss(self, outputs, labels: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        soft_student = F.log_softmax(outputs.logits / self.temperature, dim=-1)
        soft_teacher = F.softmax(teacher_logits / self.temperature, dim=-1)
        teacher_loss = F.kl_div(soft_student, soft_teacher, reduction="batchmean") * self.temperature**2
        return self.lambda_param * F.cross_entropy(outputs.logits, labels) + (1 - self.lambda_param) * teacher_loss


class TwoHeadedGuideTrainer(GuideTrainer):
    """The same trainer, with the paper's loss for a class and a distillation token."""

    def distillation_loss(self, outputs, labels: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        smoothing, alpha = self.args.label_smoothing_factor, MODES["both"].alpha
        label_loss = F.cross_entropy(outputs.cls_logits, labels, label_smoothing=smoothing)
        teacher_loss = F.cross_entropy(outputs.distillation_logits, teacher_logits.argmax(dim=-1))
        return (1 - alpha) * label_loss + alpha * teacher_loss


def make_deit_config(args: Arguments, data: ImageData) -> DeiTConfig:
    tiny = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    sizes = {"image_size": args.model.image_size, "patch_size": args.model.patch_size}
    return DeiTConfig(**tiny, **sizes, **label_maps(data.label_names))


def plain_training_arguments(args: Arguments, *names: str, **options) -> TrainingArguments:
    """What a plain Trainer takes from our arguments: `names`, the device, the precision and the output settings."""
    names += ("use_cpu", "fp16", "bf16", "disable_tqdm")
    names += ("output_dir", "save_strategy", "report_to", "logging_strategy")
    return TrainingArguments(**{name: getattr(args.training, name) for name in names}, **options)


def train_transformers(args: Arguments, data: ImageData, clock: Clock) -> None:
    """transformers' DeiT in a plain Trainer, with `Dataset.with_transform` image by image and torchvision's mixing."""
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

    recipe = ("per_device_train_batch_size", "max_steps", "learning_rate", "weight_decay", "max_grad_norm")
    recipe += ("label_smoothing_factor", "torch_compile", "dataloader_num_workers", "dataloader_pin_memory")
    trainer = TwoHeadedGuideTrainer(
        load_peers_teacher(args),
        model=DeiTForImageClassificationWithTeacher(make_deit_config(args, data)),
        args=plain_training_arguments(args, *recipe, dataloader_drop_last=True, remove_unused_columns=False),
        train_dataset=data.train.with_transform(preprocess),
        data_collator=collate,
    )
    train_with_clock(trainer, clock)


def train_as_the_guide(args: Arguments, data: ImageData, clock: Clock) -> None:
    """
    transformers' DeiT as the guide trains its student: one head, images preprocessed once, the defaults of
    `TrainingArguments` (batch 8, AdamW, learning rate 5e-5, linear), 30 epochs.
    """
    images = EvalImages(data.train, make_image_processor(args.model, args.augmentation))
    rows = [  # in memory, which is faster than the guide's files
        {"pixel_values": image, "labels": label}
        for batch in eval_batches(images, 1000)
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]
    trainer = GuideTrainer(
        load_peers_teacher(args),
        model=DeiTForImageClassification(make_deit_config(args, data)),
        args=plain_training_arguments(args, num_train_epochs=30),
        train_dataset=rows,
    )
    train_with_clock(trainer, clock)


# ---- The published baseline ----


def train_as_the_published_baseline(args: Arguments, data: ImageData, clock: Clock) -> None:
    """A notebook's loop: 224x224, images transformed one by one in this process, fp32, the loss read every step."""
    training, device = args.training, args.training.device
    student, image_processor, _ = build_network(args, data)
    resize = transforms.Resize((args.model.image_size, args.model.image_size))
    normalize = transforms.Normalize(image_processor.image_mean, image_processor.image_std)
    images = PilImages(data.train, transforms.Compose([resize, transforms.ToTensor(), normalize]))
    loader = DataLoader(images, training.train_batch_size, shuffle=True, drop_last=True)
    student.to(device).train()
    teacher = load_teacher(args).timm_model.to(device)
    clock.watch(student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=training.learning_rate)
    running_loss = 0.0
    while not clock.is_done:
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
