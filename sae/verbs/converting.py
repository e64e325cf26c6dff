"""The verb that writes what others load: convert.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from sae.errors import UserError
from sae.formats import CHECKPOINTS, EDITS
from sae.verbs.words import flags_of


def convert(argv: list[str]) -> None:
    flags = flags_of("convert", "SAE --to sparsify OUT, or SAE --feature 1286=5x --to gguf OUT")
    flags.epilog = (
        "Without --feature: the whole SAE, as a folder of saelens, sparsify or dictionary_learning. With it, dials "
        "as a file. safetensors: the whole edit, for sae.steering.load_edit. vector: what it adds where the feature is "
        "silent, as a Direction. gguf: the same as a control vector of llama.cpp. What a layout or a format cannot say "
        "is told."
    )
    flags.sae()
    flags.add_argument("out", metavar="OUT", help="what to write; what is there of its kind is replaced")
    flags.add_argument("--feature", action="append", default=[], metavar="1286=5x",
                       help="a dial as of `sae steer`: = sets, += adds, *= multiplies; again for another")  # fmt: skip
    flags.choice("--to", "layout of an SAE, or format of dials (theirs: safetensors)", (*CHECKPOINTS, *EDITS))
    flags.set_defaults(to=None)
    flags.add_argument("--sae-id", metavar="FOLDER", help="SAE is a repository of the Hub, and this the folder in it")
    flags.add_argument(
        "--trust-pickle", action="store_true",
        help="read a pickle with a torch below 2.10, whose guard against code in one can be broken",
    )  # fmt: skip
    args = flags.read(argv)
    if args.feature and (args.sae_id or args.trust_pickle):
        raise UserError("--sae-id and --trust-pickle are for a whole SAE. Convert it to saelens first, then its dials.")
    kinds = EDITS if args.feature else CHECKPOINTS
    to = args.to or kinds[0]
    if to not in kinds:
        raise UserError(
            f"--to {to}: is for dials, and no --feature is given. Give one, such as --feature 1286=5x."
            if to in EDITS
            else f"--to {to}: is for a whole SAE. Leave --feature out, or choose {', '.join(EDITS)}."
        )

    from sae import table
    from sae.run import convert, convert_layout

    if args.feature:
        made = convert(args.sae, args.feature, args.out, to)
    else:
        made = convert_layout(args.sae, args.out, to, sae_id=args.sae_id, trust_pickle=args.trust_pickle)
    table.emit({name: value for name, value in made.items() if name != "lost"})
    for line in made["lost"]:
        print(f"lost: {table.clean(line)}")
