PREPARE cores=0b11
FETCH memory=index length=40
FETCH memory=parameter source=40 length=144
FETCH core=1 memory=index source=184 length=40
FETCH core=1 memory=parameter source=224 length=144
FETCH source=1104 length=2048 signal=0
FILL count=8 weight_bits=w8 wait=0
FETCH core=1 source=5712 length=2048 signal=0
FILL core=1 count=8 weight_bits=w8 wait=0
FETCH source=3152 destination=2048 length=2048 signal=0
FILL source=2048 slot=8 count=8 weight_bits=w8 wait=0
FETCH core=1 source=7760 destination=2048 length=2048 signal=0
FILL core=1 source=2048 slot=8 count=8 weight_bits=w8 wait=0
FETCH source=5200 destination=4096 length=512 signal=0
FILL source=4096 slot=16 count=2 weight_bits=w8 signal=0 wait=0
FETCH core=1 source=9808 destination=4096 length=512 signal=1
FILL core=1 source=4096 slot=16 count=2 weight_bits=w8 signal=1 wait=1
MOVE pitch=12 plane=144 address=3850 offchip_pitch=12 offchip_plane=144 words=12 rows=12 planes=4 signal=2
SAS cores=0b11 blocks=2 height=12 width=12 wide=a8 zero=3 origin_y=-1 origin_x=-1 kernel_width=3
APW cores=0b11 mode=multiplier wide=a8 zero=5 low=5 high=250 pool_height=2 pool_width=2 bank=1 blocks=2 height=6 width=6
CONV cores=0b11 codes=4 height=6 width=6 signal=0 wait=0,1,2
PREPARE cores=0b11
FETCH memory=index source=368 destination=40 length=40
FETCH memory=parameter source=408 destination=144 length=64
FETCH core=1 memory=index source=472 destination=40 length=40
FETCH core=1 memory=parameter source=512 destination=144 length=64 signal=1
FETCH source=10320 destination=4608 length=2048 signal=2
FILL source=4608 count=8 weight_bits=w8 wait=0,2
FETCH core=1 source=14928 destination=4608 length=2048 signal=2
FILL core=1 source=4608 count=8 weight_bits=w8 wait=0,2
FETCH source=12368 destination=6656 length=2048 signal=2
FILL source=6656 slot=8 count=8 weight_bits=w8 wait=2
FETCH core=1 source=16976 destination=6656 length=2048 signal=2
FILL core=1 source=6656 slot=8 count=8 weight_bits=w8 wait=2
FETCH source=14416 destination=8704 length=512 signal=2
FILL source=8704 slot=16 count=2 weight_bits=w8 signal=2 wait=2
FETCH core=1 source=19024 destination=8704 length=512 signal=3
FILL core=1 source=8704 slot=16 count=2 weight_bits=w8 signal=3 wait=3
SAS cores=0b11 bank=1 blocks=2 height=6 width=6 wide=a8 zero=5 origin_y=-1 origin_x=-1 kernel_width=3
APW cores=0b11 shift=16 wide=a8 high=255 blocks=2 height=6 width=6
RESIDUAL cores=0b11 bank=1 blocks=2 height=6 width=6 wide=a8 shift=4
CONV cores=0b11 descriptor=40 codes=44 parameters=144 height=6 width=6 signal=0 wait=0,1,2,3
PREPARE cores=0b11
FETCH memory=index source=576 destination=80 length=48
FETCH memory=parameter source=624 destination=208 length=144
FETCH core=1 memory=index source=768 destination=80 length=48
FETCH core=1 memory=parameter source=816 destination=208 length=144 signal=1
FETCH source=19536 destination=9216 length=2048 signal=2
FILL source=9216 count=8 weight_bits=w8 wait=0,2
FETCH core=1 source=24656 destination=9216 length=2048 signal=2
FILL core=1 source=9216 count=8 weight_bits=w8 wait=0,2
FETCH source=21584 destination=11264 length=2048 signal=2
FILL source=11264 slot=8 count=8 weight_bits=w8 wait=2
FETCH core=1 source=26704 destination=11264 length=2048 signal=2
FILL core=1 source=11264 slot=8 count=8 weight_bits=w8 wait=2
FETCH source=23632 destination=13312 length=1024 signal=2
FILL source=13312 slot=16 count=4 weight_bits=w8 signal=2 wait=2
FETCH core=1 source=28752 destination=13312 length=1024 signal=3
FILL core=1 source=13312 slot=16 count=4 weight_bits=w8 signal=3 wait=3
SAS cores=0b11 blocks=2 height=6 width=6 wide=a8 stride_y=2 stride_x=2 origin_y=-1 origin_x=-1 kernel_width=3
SAS cores=0b11 context=1 bank=1 blocks=2 height=6 width=6 wide=a8 zero=5 shift=2 stride_y=2 stride_x=2
APW cores=0b11 mode=multiplier wide=a8 zero=7 low=7 high=250 bank=1 base=144 blocks=2 height=3 width=3
CONV cores=0b11 descriptor=80 codes=88 parameters=208 height=3 width=3 signal=0 wait=0,1,2,3
SAS cores=0b11 bank=1 base=144 blocks=2 height=3 width=3 wide=a8 zero=7 origin_y=-1 origin_x=-1
APW cores=0b11 shift=8 wide=a8 high=255 blocks=2 height=3 width=3
POOL cores=0b11 mode=average kernel_height=2 kernel_width=2 multiplier=255 blocks=2 height=3 width=3 signal=1 wait=0
SAS cores=0b11 bank=1 base=144 blocks=2 height=3 width=3 wide=a8 zero=7
SAS cores=0b11 context=1 blocks=2 height=3 width=3 wide=a8
APW cores=0b11 shift=11 wide=a8 zero=9 high=255 base=36 blocks=2 height=3 width=3
ADD cores=0b11 operands=two multiplier_a=3 multiplier_b=-2 multiplier=1000 blocks=2 height=3 width=3 signal=1 wait=1
SAS cores=0b11 base=36 blocks=2 height=3 width=3 wide=a8 zero=9
APW cores=0b11 wide=a8 bank=1 blocks=2 height=2 width=2
POOL cores=0b11 kernel_height=2 kernel_width=2 blocks=2 height=2 width=2 signal=1 wait=1
PREPARE cores=0b11
FETCH memory=index source=960 destination=128 length=8
FETCH memory=parameter source=968 destination=352 length=64
FETCH core=1 memory=index source=1032 destination=128 length=8
FETCH core=1 memory=parameter source=1040 destination=352 length=64 signal=2
FETCH source=29776 destination=14336 length=512 signal=3
FILL source=14336 count=2 weight_bits=w8 signal=3 wait=0,3
FETCH core=1 source=30288 destination=14336 length=512 signal=4
FILL core=1 source=14336 count=2 weight_bits=w8 signal=0 wait=0,4
SAS cores=0b11 bank=1 blocks=2 height=2 width=2 wide=a8 zero=9
APW cores=0b11 mode=raw blocks=2 height=2 width=2
CONV cores=0b11 descriptor=128 codes=132 parameters=352 height=2 width=2 signal=0 wait=0,1,2,3
MOVE direction=out pitch=16 plane=32 address=4426 offchip_pitch=16 offchip_plane=32 words=16 rows=2 planes=2 wait=0
HALT
