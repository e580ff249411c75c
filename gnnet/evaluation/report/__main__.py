"""`python -m gnnet.evaluation.report RUNS`, see `gnnet.evaluation.runs`."""

from gnnet.evaluation.runs import main

if __name__ == "__main__":
    main()
