"""A page to try a model: `python app.py MODEL`, or `--compare A B`; with `--to_space USER/NAME` it becomes a Space.

MODEL is the folder of a run, a folder with several runs to choose from on the page, a Hub id, or a timm architecture.
The page can only be reached from this machine, unless --share is given, and needs no network.
"""

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
try:
    import gradio as gr
except ImportError as error:
    advice = "pip install 'gradio>=6.24,<7'"
    print(f"app.py: the page needs packages that are not installed ({error}): {advice}", file=sys.stderr)
    sys.exit(2)

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from modeling_deit_ti.attention import attention_maps, draw_attention, learned_tokens, network_view
from modeling_deit_ti.card import RunRecord, display_names, example_files
from modeling_deit_ti.card.facts import facts
from modeling_deit_ti.card.markdown import text
from modeling_deit_ti.card.record import RECORD_FILE
from modeling_deit_ti.data.decoding import decode_image, open_image
from modeling_deit_ti.errors import UserError, exit_code
from modeling_deit_ti.interop.browser import write_static_space
from modeling_deit_ti.interop.space import MODELS_FOLDER, push_space, write_space
from modeling_deit_ti.prediction import head_logits, load_for_prediction, reporting_image_errors


MAX_SIDE = 20_000  # pixels: browsers show no larger pictures, and resizing one takes gigabytes
HEADS = {"class": "class head", "distillation": "distillation head", "both": "mean of both"}
MAX_LABELS = 5
MAX_MAPS = 3  # of the class token, the distillation token and their difference
NO_OTHER = "no other model"
PANELS = ("classify", "compare")
BLOCKS = {"all blocks (attention rollout)": slice(None), "only the last block": slice(-1, None)}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description="Opens a page to try a model.")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder of one or more runs, Hub id, or timm name")
    parser.add_argument("--compare", metavar=("A", "B"), nargs=2, help="compare two models on the same picture")
    parser.add_argument(
        "--min_probability",
        type=float,
        default=0.5,
        help="below this, the page says that no label fits (default: 0.5, where all others together are as likely)",
    )
    parser.add_argument("--port", type=int, help="default: the first free port from 7860")
    parser.add_argument("--no_browser", action="store_true", help="only print the address")
    parser.add_argument("--share", action="store_true", help="a public address for a week, through Gradio's servers")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--to_space", metavar="USER/NAME", help="push the page and its models as a Space instead")
    parser.add_argument(
        "--dry_run", type=Path, metavar="FOLDER", help="with --to_space: only write it to a new folder"
    )
    parser.add_argument("--static", action="store_true", help="with --to_space: a Space that runs in the browser")
    parser.add_argument(
        "--node_modules",
        type=Path,
        metavar="FOLDER",
        help="with --static: where npm installed transformers.js, to copy it (default: browsers fetch it from a CDN)",
    )
    return parser.parse_args(arguments)


def find_models(name: str) -> dict[str, str]:
    """
    The models that `name` refers to, by their names on the page: itself, or the folders inside it that hold a model.

    Raises:
        UserError: if it is a folder without models.
    """
    if not os.path.isdir(name):
        return {name: name}  # a Hub id, or a timm architecture
    if Path(name, "config.json").is_file():
        return {display_names([name])[0]: name}
    models = {}
    for parent, folders, files in os.walk(name):
        folders.sort()
        if "config.json" in files:
            models[Path(parent).relative_to(name).as_posix()] = parent
            folders.clear()  # a model's exports and checkpoints are the same model
    if not models:
        raise UserError(f"MODEL {name}: neither the folder nor any inside it holds a model (there is no config.json).")
    return models


def read_picture(file: str) -> tuple[Image.Image, str]:
    """
    The picture, upright and in RGB, and a remark if the file holds more than that.

    Raises:
        UserError: if it cannot be read, or is too large.
    """
    encoded, remark = {"bytes": None, "path": file}, ""
    try:
        with open_image(encoded) as header:
            if max(header.size) > MAX_SIDE:
                raise ValueError(f"it has {header.width:,}x{header.height:,} pixels; the limit is {MAX_SIDE:,} a side")
            if getattr(header, "is_animated", False):
                remark = f"This is an animation of {header.n_frames} frames; the model only sees the first."
        return decode_image(encoded), remark
    except Image.UnidentifiedImageError as error:
        raise UserError("This file is not a picture: use a JPEG, PNG, WebP, GIF, BMP or TIFF file.") from error
    except Image.DecompressionBombError as error:
        raise UserError("This picture has too many pixels: make it smaller.") from error
    except Exception as error:  # PIL's decoders may raise anything on a broken file
        raise UserError(f"This picture cannot be used: {str(error).rstrip('.') or type(error).__name__}.") from error


# ---- The page ----


class Models:
    """
    The models of the page, each loaded when it is first used.

    Args:
        names (`dict`): names or folders of the models, by their names on the page.
    """

    def __init__(self, names: dict[str, str], trust_remote_code: bool = False):
        self.names, self.trust_remote_code = names, trust_remote_code
        self.load = functools.lru_cache(maxsize=4)(self._load)

    def _load(self, name: str) -> tuple[PreTrainedModel, BaseImageProcessor, list[str]]:
        """The model, its image processor, and the tokens whose attention can be drawn."""
        model, image_processor = load_for_prediction(self.names[name], "MODEL", self.trust_remote_code)
        tokens = learned_tokens(model)
        if tokens:
            model.set_attn_implementation("eager")  # fused attention does not return its probabilities
        return model, image_processor, tokens

    def facts(self, name: str) -> str:
        """What is known about a model, as Markdown."""
        if name == NO_OTHER:
            return ""
        if not Path(self.names[name], RECORD_FILE).is_file():
            return "Nothing is known about its training: it comes without a run record."
        return facts(RunRecord.load(self.names[name]))

    def introduce(self, name: str) -> list:
        """Shows or hides a panel and what is known about its model."""
        shown = gr.update(visible=name != NO_OTHER)
        return [shown, shown, self.facts(name)]

    def examples(self) -> list[str]:
        """The example pictures of the runs, each once."""
        files = (file for path in self.names.values() for file in example_files(path))
        return list({file.read_bytes(): str(file) for file in files}.values())

    def answer(self, picture: str | None, name: str, min_probability: float, blocks: str) -> list:
        """What a panel shows for a picture: the verdict, the labels of each head, the attention maps."""
        hidden = gr.update(visible=False)
        nothing = [hidden] * (len(HEADS) + MAX_MAPS) + [""]
        if picture is None or name == NO_OTHER:
            return ["", *nothing]
        try:
            image, remark = read_picture(picture)
            model, image_processor, tokens = self.load(name)
            with reporting_image_errors(name), torch.no_grad():
                pixel_values = image_processor(images=image, return_tensors="pt")["pixel_values"]
                asked = {"output_attentions": True} if tokens else {}
                output = model(pixel_values=pixel_values.to(model.device, model.dtype), **asked)
        except UserError as error:
            return [f"### {text(error)}", *nothing]
        pictures, words = {}, ""
        if tokens:
            shares = attention_maps(output.attentions[BLOCKS[blocks]], tokens)
            maps = {token: shares[token][0] for token in tokens}
            pictures, words = draw_attention(network_view(image, image_processor), maps)
        by = f" Predicted by {text(name)}. " if len(self.names) > 1 else " "
        drawn = [gr.update(value=picture, label=title, visible=True) for title, picture in pictures.items()]
        return [
            verdict(model, output.logits[0], min_probability) + by + remark,
            *show_heads(model, output),
            *drawn,
            *[hidden] * (MAX_MAPS - len(drawn)),
            words,
        ]


def verdict(model: PreTrainedModel, logits: torch.Tensor, min_probability: float) -> str:
    """The most probable label by the logits `(K,)`, or that no label fits, as Markdown."""
    probability, label = logits.float().softmax(-1).max(-1)
    probability, name = probability.item(), text(model.config.id2label[label.item()])
    if probability < min_probability:
        return f"## No label fits\n\nThe most probable is {name}, with {probability:.0%}."
    return f"## {name}\n\n{probability:.0%} probable."


def show_heads(model: PreTrainedModel, output: ModelOutput) -> list[dict]:
    """An update for each read-out: its most probable labels, or hidden if the model does not have it."""
    readout = getattr(model.config, "readout", None)
    heads = head_logits(output, readout)
    updates = []
    for head, title in HEADS.items():
        if head in heads:
            probabilities = heads[head][0].float().softmax(-1).tolist()
            predicts = " (predicts)" if head == readout and len(heads) > 1 else ""
            value = {model.config.id2label[label]: probability for label, probability in enumerate(probabilities)}
            updates.append(gr.update(value=value, label=f"{title}{predicts}", visible=True))
        else:
            updates.append(gr.update(visible=False))
    return updates


def make_page(models: Models, chosen: list[str], min_probability: float) -> gr.Blocks:
    """The page, which starts with the one or two `chosen` models side by side."""
    names = list(models.names)
    with gr.Blocks(
        title="What is in this picture?", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as page:
        gr.Markdown("# What is in this picture?")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                sources = ["upload", "clipboard", "webcam"]
                picture = gr.Image(label="Picture", sources=sources, format="png", height=320, elem_id="picture")
                # Just the uploaded file: `read_picture` reads it, and says why if that fails.
                picture.preprocess = lambda uploaded: uploaded and uploaded.path
                if examples := models.examples():
                    samples = [[file] for file in examples]
                    # Not gr.Examples: it replaces the component above, and with it `preprocess`.
                    row = gr.Dataset(
                        components=[picture],
                        samples=samples,
                        label="Examples from the test data",
                        type="index",
                        elem_id="examples",
                    )
                    row.click(lambda index: Image.open(examples[index]), row, picture, api_name=False)
                with gr.Group(visible=len(names) > 1):
                    other = chosen[1] if len(chosen) > 1 else NO_OTHER
                    choices = [
                        gr.Dropdown(names, value=chosen[0], label="Model"),
                        gr.Dropdown([NO_OTHER, *names], value=other, label="Compare with"),
                    ]
            with gr.Column(scale=2, min_width=320), gr.Row():
                panels = [make_panel(choice.value, at) for choice, at in zip(choices, PANELS, strict=True)]
        with gr.Row():
            threshold = gr.Slider(0, 1, min_probability, step=0.01, label="No label fits below this probability")
            blocks = gr.Radio(list(BLOCKS), value=next(iter(BLOCKS)), label="Where it looks: the attention of")
        with gr.Row():
            for choice, (panel, parts), at in zip(choices, panels, PANELS, strict=True):
                with gr.Column(min_width=320, visible=choice.value != NO_OTHER) as about:
                    known = gr.Markdown(models.facts(choice.value), container=True)
                gr.on(
                    [picture.change, choice.change, threshold.change, blocks.change],
                    models.answer,
                    [picture, choice, threshold, blocks],
                    parts,
                    api_name=at,
                )
                choice.change(models.introduce, choice, [panel, about, known], api_name=False)
    return page


def make_panel(name: str, at: str) -> tuple[gr.Column, list[gr.Component]]:
    """A column for one model's answers, and its components in the order of [`Models.answer`]."""
    with gr.Column(min_width=320, visible=name != NO_OTHER) as panel:
        said = gr.Markdown(elem_id=f"{at}-verdict")
        with gr.Row():
            heads = [
                gr.Label(num_top_classes=MAX_LABELS, show_heading=False, visible=False, min_width=160) for _ in HEADS
            ]
        with gr.Row(elem_id=f"{at}-maps"):
            maps = [
                gr.Image(format="png", visible=False, min_width=120, interactive=False, buttons=["fullscreen"])
                for _ in range(MAX_MAPS)
            ]
        words = gr.Markdown()
    return panel, [said, *heads, *maps, words]


# Gradio has a button for pasting, but ignores Ctrl-V.
PASTE = """() => document.addEventListener("paste", ({ clipboardData }) => {
    const upload = document.querySelector("#picture input[type=file]");
    if (!upload || clipboardData.files.length === 0) return;
    upload.files = clipboardData.files;
    upload.dispatchEvent(new Event("change"));
})"""


def launch(page: gr.Blocks, options: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C. Raises a `UserError` if the port is taken."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_port=options.port,
            share=options.share,
            inbrowser=not (options.no_browser or gr.utils.get_space()),
            theme=theme,
            css="#picture img { width: 100%; height: 100%; object-fit: contain }",  # even a picture of 32 pixels
            js=PASTE,
            max_file_size="64mb",
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port {options.port}: the port is in use. Choose another one, or leave it out.") from error
    print(f"The page is at {address} until you press Ctrl-C.", flush=True)
    page.block_thread()


def run(options: argparse.Namespace) -> None:
    """Serves the page, or makes a Space of it. Raises a `UserError`."""
    if options.model and options.compare:
        raise UserError("MODEL and --compare cannot be combined: name two models after --compare.")
    if not 0 <= options.min_probability <= 1:
        raise UserError(f"--min_probability {options.min_probability:g}: must be between 0 and 1.")
    if (options.dry_run or options.static) and not options.to_space:
        raise UserError("--dry_run and --static need --to_space USER/NAME.")
    defaults = parse_arguments([])
    for name in ("min_probability", "port", "share", "trust_remote_code") if options.to_space else ():
        if getattr(options, name) != getattr(defaults, name):
            raise UserError(f"--{name} does not apply to a Space: leave it out.")
    if options.node_modules and not options.static:
        raise UserError("--node_modules needs --static.")
    own_models = Path(__file__).with_name(MODELS_FOLDER)  # in a Space
    if options.compare:
        chosen = display_names(options.compare)
        names = dict(zip(chosen, options.compare, strict=True))
    elif options.model or own_models.is_dir():
        names = find_models(options.model or str(own_models))
        chosen = list(names)[:1]
    else:
        raise UserError("name a MODEL, such as outputs/demo, or two after --compare.")
    if options.to_space:
        make_space(names, options)
        return
    models = Models(names, options.trust_remote_code)
    if len(names) == 1:
        models.load(chosen[0])  # with several, the page reports a broken one
    launch(make_page(models, chosen, options.min_probability), options)


def make_space(names: dict[str, str], options: argparse.Namespace) -> None:
    """Writes a Space with the models, and pushes it unless it is a dry run. Raises a `UserError`."""
    if options.dry_run and options.dry_run.exists():
        raise UserError(f"--dry_run {options.dry_run} already exists: move it, or choose another folder.")
    title = options.to_space.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dry_run or Path(temporary, "space")
        if options.static:
            if len(names) > 1:
                raise UserError("--static supports a single model: name its folder.")
            write_static_space(Path(*names.values()), folder, title, options.node_modules)
        else:
            write_space(names, folder, Path(__file__), title)
        if options.dry_run:
            how = f": python -m http.server --directory {folder}"
            if not options.static:
                how = ", run there: pip install -r requirements.txt && python app.py"
            print(f"Written to {folder}. To try it{how}")
        else:
            print(f"Pushed to {push_space(folder, options.to_space)}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code("app.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
