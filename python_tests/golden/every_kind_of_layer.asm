PREPARE cores=0b1111
FETCH memory=index length=40
FETCH memory=parameter source=40 length=144
FETCH core=1 memory=index source=184 length=40
FETCH core=1 memory=parameter source=224 length=144
FETCH core=2 memory=index source=368 length=40
FETCH core=2 memory=parameter source=408 length=144
FETCH core=3 memory=index source=552 length=40
FETCH core=3 memory=parameter source=592 length=144
FETCH source=2208 length=2048 signal=0
FILL count=8 weight_bits=w8 wait=0
FETCH core=1 source=6816 length=2048 signal=0
FILL core=1 count=8 weight_bits=w8 wait=0
FETCH core=2 source=11424 length=2048 signal=0
FILL core=2 count=8 weight_bits=w8 wait=0
FETCH core=3 source=16032 length=2048 signal=0
FILL core=3 count=8 weight_bits=w8 wait=0
FETCH source=4256 destination=2048 length=2048 signal=0
FILL source=2048 slot=8 count=8 weight_bits=w8 wait=0
FETCH core=1 source=8864 destination=2048 length=2048 signal=0
FILL core=1 source=2048 slot=8 count=8 weight_bits=w8 wait=0
FETCH core=2 source=13472 destination=2048 length=2048 signal=0
FILL core=2 source=2048 slot=8 count=8 weight_bits=w8 wait=0
FETCH core=3 source=18080 destination=2048 length=2048 signal=0
FILL core=3 source=2048 slot=8 count=8 weight_bits=w8 wait=0
FETCH source=6304 destination=4096 length=512 signal=0
FILL source=4096 slot=16 count=2 weight_bits=w8 signal=0 wait=0
FETCH core=1 source=10912 destination=4096 length=512 signal=1
FILL core=1 source=4096 slot=16 count=2 weight_bits=w8 signal=1 wait=1
FETCH core=2 source=15520 destination=4096 length=512 signal=2
FILL core=2 source=4096 slot=16 count=2 weight_bits=w8 signal=2 wait=2
FETCH core=3 source=20128 destination=4096 length=512 signal=3
FILL core=3 source=4096 slot=16 count=2 weight_bits=w8 signal=3 wait=3
MOVE pitch=12 plane=144 address=7700 offchip_pitch=12 offchip_plane=144 words=12 rows=12 planes=4 signal=4
SAS cores=0b11 blocks=2 height=12 width=12 wide=a8 zero=3 origin_y=-1 origin_x=-1 kernel_width=3
APW cores=0b11 mode=multiplier wide=a8 zero=5 low=5 high=250 pool_height=2 pool_width=2 bank=1 blocks=2 height=6 width=6
CONV cores=0b11 codes=4 height=3 width=6 signal=0 wait=0,1,4
SAS cores=0b1100 blocks=2 height=12 width=12 wide=a8 zero=3 origin_y=5 origin_x=-1 kernel_width=3
APW cores=0b1100 mode=multiplier wide=a8 zero=5 low=5 high=250 pool_height=2 pool_width=2 bank=1 blocks=2 height=6 width=6
CONV cores=0b1100 codes=4 y=3 height=3 width=6 signal=1 wait=2,3,4
PREPARE cores=0b1111
FETCH memory=index source=736 destination=40 length=40
FETCH memory=parameter source=776 destination=144 length=64
FETCH core=1 memory=index source=840 destination=40 length=40
FETCH core=1 memory=parameter source=880 destination=144 length=64 signal=2
FETCH core=2 memory=index source=944 destination=40 length=40
FETCH core=2 memory=parameter source=984 destination=144 length=64
FETCH core=3 memory=index source=1048 destination=40 length=40
FETCH core=3 memory=parameter source=1088 destination=144 length=64 signal=3
FETCH source=20640 destination=4608 length=2048 signal=4
FILL source=4608 count=8 weight_bits=w8 wait=0,4
FETCH core=1 source=25248 destination=4608 length=2048 signal=4
FILL core=1 source=4608 count=8 weight_bits=w8 wait=0,4
FETCH core=2 source=29856 destination=4608 length=2048 signal=4
FILL core=2 source=4608 count=8 weight_bits=w8 wait=1,4
FETCH core=3 source=34464 destination=4608 length=2048 signal=4
FILL core=3 source=4608 count=8 weight_bits=w8 wait=1,4
FETCH source=22688 destination=6656 length=2048 signal=4
FILL source=6656 slot=8 count=8 weight_bits=w8 wait=4
FETCH core=1 source=27296 destination=6656 length=2048 signal=4
FILL core=1 source=6656 slot=8 count=8 weight_bits=w8 wait=4
FETCH core=2 source=31904 destination=6656 length=2048 signal=4
FILL core=2 source=6656 slot=8 count=8 weight_bits=w8 wait=4
FETCH core=3 source=36512 destination=6656 length=2048 signal=4
FILL core=3 source=6656 slot=8 count=8 weight_bits=w8 wait=4
FETCH source=24736 destination=8704 length=512 signal=4
FILL source=8704 slot=16 count=2 weight_bits=w8 signal=4 wait=4
FETCH core=1 source=29344 destination=8704 length=512 signal=5
FILL core=1 source=8704 slot=16 count=2 weight_bits=w8 signal=5 wait=5
FETCH core=2 source=33952 destination=8704 length=512 signal=6
FILL core=2 source=8704 slot=16 count=2 weight_bits=w8 signal=6 wait=6
FETCH core=3 source=38560 destination=8704 length=512 signal=7
FILL core=3 source=8704 slot=16 count=2 weight_bits=w8 signal=7 wait=7
SAS cores=0b11 bank=1 blocks=2 height=6 width=6 wide=a8 zero=5 origin_y=-1 origin_x=-1 kernel_width=3
APW cores=0b11 shift=16 wide=a8 high=255 blocks=2 height=6 width=6
RESIDUAL cores=0b11 bank=1 blocks=2 height=6 width=6 wide=a8 shift=4
CONV cores=0b11 descriptor=40 codes=44 parameters=144 height=3 width=6 signal=2 wait=0,1,2,4,5
SAS cores=0b1100 bank=1 blocks=2 height=6 width=6 wide=a8 zero=5 origin_y=2 origin_x=-1 kernel_width=3
APW cores=0b1100 shift=16 wide=a8 high=255 blocks=2 height=6 width=6
RESIDUAL cores=0b1100 bank=1 blocks=2 height=6 width=6 wide=a8 shift=4 y=3
CONV cores=0b1100 descriptor=40 codes=44 parameters=144 y=3 height=3 width=6 signal=0 wait=0,1,3,6,7
PREPARE cores=0b1111
FETCH memory=index source=1152 destination=80 length=48
FETCH memory=parameter source=1200 destination=208 length=144
FETCH core=1 memory=index source=1344 destination=80 length=48
FETCH core=1 memory=parameter source=1392 destination=208 length=144 signal=1
FETCH core=2 memory=index source=1536 destination=80 length=48
FETCH core=2 memory=parameter source=1584 destination=208 length=144
FETCH core=3 memory=index source=1728 destination=80 length=48
FETCH core=3 memory=parameter source=1776 destination=208 length=144 signal=3
FETCH source=39072 destination=9216 length=2048 signal=4
FILL source=9216 count=8 weight_bits=w8 wait=2,4
FETCH core=1 source=44192 destination=9216 length=2048 signal=4
FILL core=1 source=9216 count=8 weight_bits=w8 wait=2,4
FETCH core=2 source=49312 destination=9216 length=2048 signal=4
FILL core=2 source=9216 count=8 weight_bits=w8 wait=0,4
FETCH core=3 source=54432 destination=9216 length=2048 signal=4
FILL core=3 source=9216 count=8 weight_bits=w8 wait=0,4
FETCH source=41120 destination=11264 length=2048 signal=4
FILL source=11264 slot=8 count=8 weight_bits=w8 wait=4
FETCH core=1 source=46240 destination=11264 length=2048 signal=4
FILL core=1 source=11264 slot=8 count=8 weight_bits=w8 wait=4
FETCH core=2 source=51360 destination=11264 length=2048 signal=4
FILL core=2 source=11264 slot=8 count=8 weight_bits=w8 wait=4
FETCH core=3 source=56480 destination=11264 length=2048 signal=4
FILL core=3 source=11264 slot=8 count=8 weight_bits=w8 wait=4
FETCH source=43168 destination=13312 length=1024 signal=4
FILL source=13312 slot=16 count=4 weight_bits=w8 signal=4 wait=4
FETCH core=1 source=48288 destination=13312 length=1024 signal=5
FILL core=1 source=13312 slot=16 count=4 weight_bits=w8 signal=5 wait=5
FETCH core=2 source=53408 destination=13312 length=1024 signal=6
FILL core=2 source=13312 slot=16 count=4 weight_bits=w8 signal=6 wait=6
FETCH core=3 source=58528 destination=13312 length=1024 signal=7
FILL core=3 source=13312 slot=16 count=4 weight_bits=w8 signal=7 wait=7
SAS cores=0b11 blocks=2 height=6 width=6 wide=a8 stride_y=2 stride_x=2 origin_y=-1 origin_x=-1 kernel_width=3
SAS cores=0b11 context=1 bank=1 blocks=2 height=6 width=6 wide=a8 zero=5 shift=2 stride_y=2 stride_x=2
APW cores=0b11 mode=multiplier wide=a8 zero=7 low=7 high=250 bank=1 base=144 blocks=2 height=3 width=3
CONV cores=0b11 descriptor=80 codes=88 parameters=208 height=2 width=3 signal=1 wait=0,1,2,4,5
SAS cores=0b1100 blocks=2 height=6 width=6 wide=a8 stride_y=2 stride_x=2 origin_y=3 origin_x=-1 kernel_width=3
SAS cores=0b1100 context=1 bank=1 blocks=2 height=6 width=6 wide=a8 zero=5 shift=2 stride_y=2 stride_x=2 origin_y=4
APW cores=0b1100 mode=multiplier wide=a8 zero=7 low=7 high=250 bank=1 base=144 blocks=2 height=3 width=3
CONV cores=0b1100 descriptor=80 codes=88 parameters=208 y=2 height=1 width=3 signal=0 wait=0,2,3,6,7
SAS cores=0b11 bank=1 base=144 blocks=2 height=3 width=3 wide=a8 zero=7 origin_y=-1 origin_x=-1
APW cores=0b11 shift=8 wide=a8 high=255 blocks=2 height=3 width=3
POOL cores=0b11 mode=average kernel_height=2 kernel_width=2 multiplier=255 blocks=2 height=3 width=3 signal=2 wait=0,1
SAS cores=0b11 bank=1 base=144 blocks=2 height=3 width=3 wide=a8 zero=7
SAS cores=0b11 context=1 blocks=2 height=3 width=3 wide=a8
APW cores=0b11 shift=11 wide=a8 zero=9 high=255 base=36 blocks=2 height=3 width=3
ADD cores=0b11 operands=two multiplier_a=3 multiplier_b=-2 multiplier=1000 blocks=2 height=3 width=3 signal=2 wait=2
SAS cores=0b11 base=36 blocks=2 height=3 width=3 wide=a8 zero=9
APW cores=0b11 wide=a8 bank=1 blocks=2 height=2 width=2
POOL cores=0b11 kernel_height=2 kernel_width=2 blocks=2 height=2 width=2 signal=2 wait=2
PREPARE cores=0b1111
FETCH memory=index source=1920 destination=128 length=8
FETCH memory=parameter source=1928 destination=352 length=64
FETCH core=1 memory=index source=1992 destination=128 length=8
FETCH core=1 memory=parameter source=2000 destination=352 length=64 signal=3
FETCH core=2 memory=index source=2064 destination=128 length=8
FETCH core=2 memory=parameter source=2072 destination=352 length=64
FETCH core=3 memory=index source=2136 destination=128 length=8
FETCH core=3 memory=parameter source=2144 destination=352 length=64 signal=4
FETCH source=59552 destination=14336 length=512 signal=5
FILL source=14336 count=2 weight_bits=w8 signal=5 wait=1,5
FETCH core=1 source=60064 destination=14336 length=512 signal=6
FILL core=1 source=14336 count=2 weight_bits=w8 signal=1 wait=1,6
FETCH core=2 source=60576 destination=14336 length=512 signal=6
FILL core=2 source=14336 count=2 weight_bits=w8 signal=6 wait=0,6
FETCH core=3 source=61088 destination=14336 length=512 signal=7
FILL core=3 source=14336 count=2 weight_bits=w8 signal=7 wait=0,7
SAS cores=0b11 bank=1 blocks=2 height=2 width=2 wide=a8 zero=9
APW cores=0b11 mode=raw blocks=2 height=2 width=2
CONV cores=0b11 descriptor=128 codes=132 parameters=352 height=1 width=2 signal=1 wait=1,2,3,5
SAS cores=0b1100 bank=1 blocks=2 height=2 width=2 wide=a8 zero=9 origin_y=1
APW cores=0b1100 mode=raw blocks=2 height=2 width=2
CONV cores=0b1100 descriptor=128 codes=132 parameters=352 y=1 height=1 width=2 signal=0 wait=0,2,4,6,7
MOVE direction=out pitch=16 plane=32 address=8276 offchip_pitch=16 offchip_plane=32 words=16 rows=2 planes=2 wait=0,1
HALT
