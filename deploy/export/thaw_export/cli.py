"""The command `thaw-export`. Results and words go to stderr; the only thing written is the archive."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

DESCRIPTION = "Write a PyTorch model as the .pt2 graph that Thaw fine-tunes."
EXAMPLES = """\
SOURCE is one of
  a folder               a local Hugging Face model: config.json, *.safetensors, tokenizer.json
  torchvision:NAME       a torchvision architecture, e.g. torchvision:resnet18
  timm:NAME              a timm architecture, e.g. timm:vit_tiny_patch16_224
  MODULE:FUNCTION        your function, returning (module, example_inputs[, dynamic_shapes])

examples:
  thaw-export ./all-MiniLM-L6-v2 -o minilm.pt2
  thaw-export torchvision:resnet18 --weights resnet18.safetensors -o resnet18.pt2
  thaw-export mymodels:tiny_resnet --mean 0.5 --std 0.5 -o tiny.pt2
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "thaw-export", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.pt2", help="archive to write")
    parser.add_argument("--weights", metavar="FILE", help="local .safetensors file (default: new weights; not for folders)")
    parser.add_argument("--num-classes", type=positive, metavar="N", help="outputs of the exported classifier")
    parser.add_argument(
        "--task",
        choices=["auto", "embedding", "classification"],
        default="auto",
        help="what a Hugging Face folder is exported as (default: what its config says)",
    )
    parser.add_argument("--image-size", type=positive, metavar="N", help="pixels of the square input image")
    parser.add_argument("--max-length", type=positive, metavar="N", help="longest text of a MODULE:FUNCTION source, in tokens")
    parser.add_argument("--mean", type=float, nargs="+", metavar="X", help="per-channel mean of inputs scaled to 0..1")
    parser.add_argument("--std", type=float, nargs="+", metavar="X", help="per-channel standard deviation")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of new weights (default: 0)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    # Before torch and its friends are imported: nothing may be fetched, whatever a config names.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    from thaw_export.errors import ExportError

    try:
        run(options)
    except ExportError as error:
        say(f"thaw-export: error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def run(options: argparse.Namespace) -> None:
    from thaw_export.errors import ExportError

    path = Path(options.output).absolute()
    if path.suffix != ".pt2":
        raise ExportError(f"output {options.output} must end in .pt2")
    if not path.parent.is_dir():
        raise ExportError(f"output folder {path.parent} does not exist; make it first")

    import torch

    from thaw_export import archive

    torch.manual_seed(options.seed)
    say(f"loading {options.source}")
    source = load(options)
    say("exporting")
    program = archive.export(source)
    result = archive.check(source, program)
    sizes = archive.sizes(program)
    archive.save(source, program, path, options.source)
    say(f"graph: {sizes.nodes} nodes, {sizes.operators} operators, {sizes.parameters:,} parameters in {sizes.tensors} tensors")
    say(f"check: {result}")
    say(f"wrote {options.output} ({path.stat().st_size / 1e6:.1f} MB)")


def load(options: argparse.Namespace):
    """Picks the loader by the look of SOURCE: a folder, a library's prefix, or module:function."""
    from thaw_export.errors import ExportError

    text = options.source
    if Path(text).is_dir():
        if options.weights:
            raise ExportError("--weights is not for a folder: it brings its own weights")
        from thaw_export.huggingface import huggingface_source

        return huggingface_source(Path(text), options)
    library, colon, name = text.partition(":")
    if not colon:
        raise ExportError(f"no folder {text!r}; SOURCE is a folder, torchvision:NAME, timm:NAME or MODULE:FUNCTION")
    if library == "torchvision":
        from thaw_export.vision import torchvision_source

        return torchvision_source(name, options)
    if library == "timm":
        from thaw_export.vision import timm_source

        return timm_source(name, options)
    from thaw_export.function import function_source

    return function_source(text, options)
