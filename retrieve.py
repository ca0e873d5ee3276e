"""Answer queries from a gallery: python retrieve.py checkpoints='[RUN/checkpoints/best.ckpt]' gallery=DIR queries=DIR"""

from beauty_bafe.commands.retrieve import main
from beauty_bafe.commands.retrieve import retrieve as retrieve

if __name__ == "__main__":
    main()
