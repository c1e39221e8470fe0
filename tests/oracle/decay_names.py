"""The parameters of models that transformers' Trainer lets decay. Run by the oracle's Python.

    python decay_names.py JOBS.json NAMES.json

JOBS is {name: {"architecture": class, "config": config.json}}; NAMES gets {name: [parameter, …]}.
"""

import json
import pathlib
import sys

import torch
import transformers


def main(jobs_path: str, names_path: str) -> None:
    names = {}
    for name, job in json.loads(pathlib.Path(jobs_path).read_text()).items():
        options = dict(job["config"])
        config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
        with torch.device("meta"):
            model = getattr(transformers, job["architecture"])(config)
        # The method reads nothing of its trainer.
        decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
        names[name] = [parameter for parameter, _ in model.named_parameters() if parameter in decayed]
    pathlib.Path(names_path).write_text(json.dumps(names))


if __name__ == "__main__":
    main(*sys.argv[1:])
