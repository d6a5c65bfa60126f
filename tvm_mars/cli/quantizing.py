"""``mars quantize``."""

from __future__ import annotations

from typing import Any

import click

from ..frontend.ports import read_arrays
from .base import MarsCommand, write_file
from .compiling import check_model

__all__ = ["quantize_command"]

_width = click.Choice(["4", "8"])


@click.command("quantize", cls=MarsCommand)
@click.argument("model", metavar="FLOAT.onnx")
@click.option(
    "--data",
    required=True,
    metavar="IMAGES.npz",
    help="Some hundred typical images: an array [N, ...] for each input of the model, by its name.",
)
@click.option("-o", "--output", required=True, metavar="OUT.onnx", help="Quantized model to write.")
@click.option("--weight-bits", type=_width, default="8", show_default=True)
@click.option("--activation-bits", type=_width, default="8", show_default=True)
@click.option("--input-bits", type=_width, default="8", show_default=True)
@click.option("--first-weight-bits", type=_width, help="Of layers that read an input.")
@click.option("--last-weight-bits", type=_width, help="Of layers that give an output.")
@click.option(
    "--input-range",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="What the inputs can be; by default 0 1, or what the images span if that is more.",
)
@click.option(
    "--method",
    type=click.Choice(["corrected", "paper"]),
    default="corrected",
    show_default=True,
    help="`paper` is eq. 5 to 8 as they stand; `corrected` takes up what they lose untrained.",
)
def quantize_command(model: str, data: str, output: str, **options: Any) -> None:
    """Quantize a float ONNX model for MARS, without training it.

    Batch norm is folded into the weights (the paper's eq. 6 to 8), and each map takes the range
    that fits it best on the given images (eq. 5). Taken are NCHW models of convolutions, dense
    layers, batch norms, ReLUs, pools and additions. 8 bits keep most models' accuracy; 4-bit
    weights usually need training (`mars train`).

    \b
    Example, of a model with the input x0:
      python -c "import numpy; numpy.savez('images.npz', x0=images)"
      mars quantize float.onnx --data images.npz -o net.onnx
      mars compile net.onnx -o net.so --dump-offloads -
    """
    check_model(model)
    images = read_arrays(data)
    options = {
        name: int(value) if name.endswith("_bits") else value
        for name, value in options.items()
        if value is not None
    }

    from ..frontend import adapter  # imports TVM

    ir = adapter()
    if ir.IR == "Relay":  # which knows no open batch
        options["shape"] = {name: (1, *array.shape[1:]) for name, array in images.items()}
    quantized = ir.quantize_to_onnx(model, calibration=images, **options)
    write_file(output, quantized.SerializeToString())
    count = max(len(array) for array in images.values())
    click.echo(f"wrote {output}, its ranges from {count} images", err=True)
