"""`python -m fastllama` and `torchrun … -m fastllama` run the command `fastllama`."""

from fastllama.cli import main

if __name__ == "__main__":
    main()
