"""`python -m cat_cluster.cli` is the command `cat-cluster`."""

from cat_cluster.cli.app import main

main()
