"""selfalign's command line, where CPU processes share weights out too."""

from training_jobs import shard_on_the_cpu

from selfalign.cli.main import main

if __name__ == "__main__":
    shard_on_the_cpu()
    main()
