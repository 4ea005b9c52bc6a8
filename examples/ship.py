"""Ship experts: pack them into one bundle, verify it, push it, and have one back by name.

python examples/ship.py                    # packs, verifies and loads, all of it here
python examples/ship.py --repo org/name    # pushes to the Hub (after `hf auth login`), and loads from there
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import digits

import tallstore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=digits.OUT, help="folder for checkpoints and bundle")
    parser.add_argument("--repo", metavar="ORG/NAME", help="repository on the Hub; made if it is not there")
    arguments = parser.parse_args()

    base, experts = digits.checkpoints(arguments.out)
    path = arguments.out / "bundle"
    # Three levels each are good for a few experts; for many, leave `method` out (see README). With the base embedded,
    # readers need nothing else; base_ref="org/base@<commit>" tells them where it is instead.
    method = tallstore.Uniform(levels=3, scale="tensor")
    print(tallstore.pack(base, experts, path, method=method, embed_base=True, overwrite=True))

    if problems := tallstore.verify(path):
        sys.exit("\n".join(map(str, problems)))
    print(f"{path}: every rule of the format holds, every byte is the one that was written")

    where = str(path)
    if arguments.repo:
        commit = tallstore.push(path, arguments.repo)
        print(f"pushed: {commit.commit_url}")
        where = f"{arguments.repo}@{commit.oid}"  # readers who name the commit get these bytes, whoever pushes next

    with tallstore.open_bundle(where) as bundle:
        print(f"experts in {where}: {', '.join(bundle.tasks)}")
        model = digits.network()
        bundle.load_into(model, "rotated")
        print(f"'rotated' gets {digits.accuracy(model, 'rotated'):.1%} of its test images right, ", end="")
        print(f"having read {bundle.bytes_read:,} bytes")


if __name__ == "__main__":
    main()
