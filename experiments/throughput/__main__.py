from experiments.throughput.steps import main

main()
