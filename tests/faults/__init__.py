"""A campaign of faults: hostile files, kills, machines at their limits, odd numbers, and marks.

    python -m tests.faults --area dicom --cases 500 --seed 7     # one area, or --area all
    python -m tests.faults --area all --cases 40 --record        # and writes RESULTS.md

Each case is made from (area, seed, number) alone, so that what fails can be made again. It passes
when the command ends as it should (what cannot be used is listed, or one line names the file),
without a traceback, within a minute and the memory that is allowed, with nothing written outside
and no code run, and when the healthy files of the same run give the same numbers.

    mutations.py   what is done to bytes, names, values and folders
    worker.py      a process that makes cases and judges them, many one after the other
    images.py stores.py models.py tables.py    areas of hostile files
    processes.py numbers.py privacy.py         kills, machines, odd numbers, marks
    fuzz.py        a coverage-guided fuzzer over our own parsers (needs atheris)
"""
