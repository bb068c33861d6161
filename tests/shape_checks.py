"""The type checker that tests run steerlib under: beartype, where an int is a float as in Python itself."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
