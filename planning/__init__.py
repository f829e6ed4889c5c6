"""What a run will take, before it runs: memory, time, money, and the mesh to choose."""
