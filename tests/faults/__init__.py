"""A campaign of faults: damaged files, killed commands, patient data in headers.

    python -m tests.faults                                      # all areas, 20 cases each
    python -m tests.faults --area dicom kill --cases 500 --seed 7
    python -m tests.faults --area kill --seed 7 --number 12     # one case again

A case depends only on (area, seed, number), and runs in a separate folder and a forked process. It
passes if the command ends in time and without a traceback: with status 0, or with one line that
names the file. The undamaged files of the same run must give the same numbers, no program may be
started, and nothing may be written outside the case's folder.

    changes.py     damage to bytes and names
    commands.py    running command lines, checking how they end, the cohort of all cases
    files.py       areas of damaged files
    processes.py   areas of killed and concurrent commands
    privacy.py     area of patient data in headers and names of folders
"""
