"""Make a set of real and fake images from any folder of images: half of the crops go through a generator.

  uv run jobs/make_fakes.py images=<folder of images> generator=transposed output=data/fakes/transposed
  uv run jobs/make_fakes.py images=<folder of images> generator=nearest max_images=600 jpeg_quality=null

Writes {train,val,test}/{0_real,1_fake}/, both classes with the same history (native pixels, one last encoding);
train on it with data.root=<output> data.decode.fit=native. The same command again finds the set that is there.
"""

from potstill.config import MakeFakesConfig, job


@job("make_fakes")
def main(config: MakeFakesConfig) -> None:
    from potstill import console
    from potstill.data.fakes import make_fakes_shown

    console.say(f"In {make_fakes_shown(config)}")


if __name__ == "__main__":
    main()
