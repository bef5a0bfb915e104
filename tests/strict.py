"""What checks types and shapes of every call in `make test-all`: beartype.

To which an int is a float, as it is to mypy.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
