"""What differs between generation libraries, a folder each with its host in `host.py`; only `attach.py` registers hooks."""
