from sb3_grpo_plugin.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
