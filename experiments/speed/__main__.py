from experiments.speed.benchmark import main

main()
