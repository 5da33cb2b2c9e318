"""Making and checking data sets: image folders and published trees to latent shards; `dit-fast shards`."""
