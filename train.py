"""Train a background-agnostic extractor on catalogue photos: python train.py model=resnet50 data=folder data.root=GALLERY"""

from beauty_bafe.commands.train import main
from beauty_bafe.commands.train import train as train

if __name__ == "__main__":
    main()
