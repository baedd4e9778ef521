"""The kinds of devices, one file each, and what each of them must offer."""
