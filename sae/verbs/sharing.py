"""The verb that gives an SAE away: push.

A verb is parse, one call, one print. Heavy imports happen inside; results go to stdout, everything else to stderr.
"""

from sae.verbs.words import flags_of


def push(argv: list[str]) -> None:
    flags = flags_of("push", "SAE user/repo [--path NAME]")
    flags.epilog = (
        "Safetensors, JSON and README.md (the folder's own, else a card from what is known), in one commit or none. A "
        "README.md that somebody else wrote there stays. Log in first (hf auth login), or set HF_TOKEN."
    )
    flags.sae()
    flags.add_argument("repo", metavar="REPO", help="user/repo; made where it is missing")
    flags.add_argument("--path", metavar="NAME", help="the folder in it; default: its top")
    flags.add_argument("--revision", metavar="BRANCH", help="made where it is missing (default main)")
    flags.add_argument("--private", action="store_true", help="where the repository is made: for you alone")
    flags.choice("--dtype", "of the matrices", ("float32", "bfloat16"))
    args = flags.read(argv)

    from sae.run import push

    print(push(args.sae, args.repo, args.path, dtype=args.dtype, revision=args.revision, private=args.private))
