"""The API server of a cluster: its objects, ports of its pods, the storage behind them."""
