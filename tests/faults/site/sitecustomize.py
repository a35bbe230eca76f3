"""Read by every Python process that has this folder on PYTHONPATH: arms the faults that $PLUMBLINE_FAULTS names."""

import os

if os.environ.get("PLUMBLINE_FAULTS"):
    import faultpoints

    faultpoints.arm(os.environ["PLUMBLINE_FAULTS"])
