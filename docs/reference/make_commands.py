"""Write the reference page of the commands from the functions' signatures and docstrings.

Run it after a change of a public signature or docstring: ``python docs/reference/make_commands.py``.
"""

import re
import sys
from pathlib import Path

from biopsy.cli import build_app

PAGE = Path(__file__).with_name("commands.md")
HEAD = """# Command line

<!-- Written by make_commands.py: change the docstrings, then run it. -->

Each command is the function of the same name in `biopsy`, each option its parameter of the same name;
`biopsy COMMAND --help` prints the same text.

* Lists are written with commas (`--seeds 0,1,2`); `--set`, `--grid` and `--patch` are repeated instead.
* Results go to **stdout**, with `--json` as JSON; log and progress go to **stderr**: less with `--quiet`,
  all of it with `--verbose`, and into a file with `--log-file FILE`.
* Exit codes: **0** success; **1** an error, in one line, or blocking issues (`inspect`); **2** wrong usage;
  **3** finished, but input that could not be read was skipped, named and counted; **130** interrupted.
* `biopsy --install-completion` installs completion for bash, zsh, fish or PowerShell.
* Only `fetch`, `publish` and classifiers named `hf:ORG/NAME` use the network.

```console
$ biopsy prepare archive.zip --out idc.pack --export-tree datasets/idc
$ biopsy inspect idc.pack --split patients
$ biopsy split idc.pack --protocol leave-one-out --test-patients 8863,8865,8867 --name loso
$ biopsy train cancernet-2020 --data idc.pack --split patients --set train.lr=0.005 --out runs/lower
$ biopsy train --resume runs/lower
$ biopsy pretrain idc-small --data idc.pack --split patients --epochs 100
$ biopsy evaluate runs/lower --subset validation --json
$ biopsy evaluate theirs.csv --positive tumour --report theirs.html --csv tables
$ biopsy calibrate runs/lower --method platt
$ biopsy compare runs/lower runs/higher --metric balanced_accuracy
$ biopsy compare --plan runs/lower --difference 0.03 --power 0.8
$ biopsy errors runs/lower --n 30 --out errors
$ biopsy label-issues studies/loso --out label-issues
$ biopsy explain runs/lower --method grad_cam --layer body.relu2_2 --errors 10 --out maps
$ biopsy report runs/lower studies/loso --out reports --hide-ids
$ biopsy predict runs/lower a.png folder/ archive.zip other.pack --out table.parquet
$ biopsy slide runs/lower slides/ case.svs --out maps --stride-um 100 --detections
$ biopsy slide runs/lower slides/ --out maps --shard 3/8
$ biopsy verify runs/lower --retrain
$ biopsy doctor --path maps
$ biopsy next runs/lower idc.pack --budget 50 --out queue.csv
$ biopsy view idc.pack --queue queue.csv --who ada
$ biopsy serve runs/lower classifier --root slides --port 8780
$ biopsy export runs/lower bundle
$ biopsy publish bundle lab/breast-idc
$ biopsy import-keras model.keras --model cancernet-2020 --out classifiers/mine
$ biopsy study cancernet-2020 --data idc.pack --folds 5 --seeds 0,1,2
$ biopsy sweep cancernet-2020 --data idc.pack --grid train.lr=0.01,0.001 --grid train.batch_size=32,128
$ biopsy probe h-optimus-0 lunit-s16=lunit.safetensors --data pcam.pack --split site
$ biopsy reproduce --data idc.pack --test-patients 8863,8865,8867 --budget 240
```

"""


def render() -> str:
    """Return the page: the list of commands, the options all have, then each command."""
    text = build_app(quote="`").generate_docs().replace("```console", "```text")
    text = text[text.index("**Start**:") :]
    text = re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\[", "["), text)  # escaped for the terminal
    common = re.search(r"\*\*Common options\*\*:\n\n(?:\* .*\n)+\n*", text)
    assert common is not None
    rest = text[common.end() :].replace(common[0], "").replace(common[0].rstrip(), "")
    return HEAD + text[: common.end()] + rest.rstrip() + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(render(), end="")
    else:
        PAGE.write_text(render(), encoding="utf-8")
