"""What runs on the device, imported as ``relattn.kernels``: ``gpu`` (Triton) and ``cpu`` (C++)."""
