"""What differs between generation libraries. One file a library; only `attach.py` registers hooks."""
