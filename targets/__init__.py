"""Output formats, one per file, named in ``erasec.registry``. A target writes a format and checks what it wrote."""
