"""How annotations are executed in tests."""

from beartype import BeartypeConf, beartype

# By PEP 484 an int is a float: users pass lora_alpha=16.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
