"""The verb that writes what others load: convert.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from sae.errors import UserError
from sae.formats import EDITS
from sae.verbs.words import flags_of


def convert(argv: list[str]) -> None:
    flags = flags_of("convert", "SAE --feature 1286=5x [--feature 77+=2x …] --to gguf OUT")
    flags.epilog = (
        "safetensors: the whole edit, for sae.steering.load_edit. vector: what it adds where the feature is silent, as "
        "a Direction. gguf: the same as a control vector of llama.cpp. What a format cannot say is told."
    )
    flags.sae()
    flags.add_argument("out", metavar="OUT", help="the file to write; one that is there is replaced")
    flags.add_argument("--feature", action="append", default=[], metavar="1286=5x",
                       help="a dial as of `sae steer`: = sets, += adds, *= multiplies; again for another")  # fmt: skip
    flags.choice("--to", "format", EDITS)
    args = flags.read(argv)
    if not args.feature:
        raise UserError("no --feature given. Write: sae convert SAE --feature 1286=5x --to gguf OUT")

    from sae import table
    from sae.run import convert

    made = convert(args.sae, args.feature, args.out, args.to)
    table.emit({name: value for name, value in made.items() if name != "lost"})
    for line in made["lost"]:
        print(f"lost: {table.clean(line)}")
