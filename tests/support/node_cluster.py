"""A Ray cluster of several nodes on this machine, in a process of its own: `python -m tests.support.node_cluster 1 1`.

The numbers are the processors of each node, the head first. It prints the address, then obeys one line at a time:
`kill` ends the newest node as a power cut does, `add N` brings a node with N processors. At the end of its input it
ends.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

MEMORY = 100_000_000


def main() -> None:
    """Start the nodes and obey."""
    head, *others = map(int, sys.argv[1:])
    options = {"num_cpus": head, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    nodes = [cluster.add_node(num_cpus=cpus, object_store_memory=MEMORY) for cpus in others]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        command, *values = line.split()
        if command == "kill":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif command == "add":
            nodes.append(cluster.add_node(num_cpus=int(values[0]), object_store_memory=MEMORY))
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
