"""`kill -9` of the app at many points of every kind of operation, and what is left of it.

    python -m tests.killed --kills 100 [--seed 1] [--sqlite]

A real app process on a real database and a real Orthanc works for many clients, and is killed: at
random moments, and at chosen points (`process.POINTS`). After the last start Orthanc, the tables,
the trail and what the clients were told are compared (`comparison`).
"""
