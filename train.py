"""Train a continual learner: ``python train.py strategy=coda_prompt scenario=split_cifar100``."""

from cl_platform.cli.train import main

if __name__ == "__main__":
    main()
