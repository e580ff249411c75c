"""`python -m gnnet.evaluation.report FILES`, see `gnnet.evaluation.tables`."""

from gnnet.evaluation.tables import main

if __name__ == "__main__":
    main()
