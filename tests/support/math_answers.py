"""Answers chosen by hand: a reference, then answers to it, with three spaces between them.

An answer stands in a box; behind ">>" it is the whole completion.
"""

from __future__ import annotations

RIGHT = r"""
5   5   >> $\boxed{5\text{ units}}$   \textbf{5}   >> **5**   >> The answer is **5**.
5   >> Answer: 5   >> = 5   >> $5$   >> \(5\)   >> \[ x = 5 \]
5   >> The final answer is $\boxed{5}$. I hope it is correct.   \text{The answer is } 5
5   \text{Answer: }5   ５   >> The answer is ５.   >> Therefore, the total is 5 dollars.   >> #### 5
5   5 \, \text{cm}   >> \boxed{5}.   5.   \displaystyle 5   {5}   >> \fbox{5}
5   >> \boxed{\boxed{5}}
12   12\text{ cm}^3   >> 12 o'clock   12\text{ sq. units}
\frac{\pi}{4}   \frac{1}{4}\pi   0.785398
2\sqrt{2}   >> 2\sqrt{2}
(-\infty, 2]   x \leq 2
[0, \infty)   x\ge 0
x^2+2x+1   (x+1)^2
-\frac{1}{2}   \frac{-1}{2}   -0.5
1,234,567   1234567
1234567   1,234,567
10,000   >> 10 000
0.5   .5
3.0   3
1/3   >> 0.333333
\frac{2}{3}   0.6666667
\text{Tuesday}   Tuesday
Tuesday   \text{ tuesday}
yes   \text{Yes.}
\text{(C)}   C
C   \textbf{(C) } 15   (C)
120^\circ   120
120   120^{\circ}   >> The angle is 120°.   \binom{10}{3}   5!
\$12.50   12.50   \$12.50
12.5   \$12.50
p = 7   7
7   p = 7   >> x_1 = 7   7\,\text{in}   7 in   +7   7.00
f(x) = x^2   x^2
x^2   f(x)=x^2
f^{-1}(x) = x - 1   x-1
x-1   f^{-1}(x)=x-1
a_n = 2n+1   2n+1
2n+1   a_n=2n+1
x=3,y=4   x=3, y=4
(3,4)   x=3, y=4   (x, y) = (3, 4)
\{1, 2, 3\}   \{3,1,2\}
1,2,3   1, 2, 3
1, 2   x=1 \text{ or } x=2
-1,2   2, -1
\pm 3   \pm 3   3,-3
3,-3   x=\pm 3
1+2i   2i+1
\frac{1+\sqrt{5}}{2}   \frac{\sqrt5+1}{2}   0.5+\frac{\sqrt{5}}{2}
\sqrt{13}   \sqrt{13}
\sqrt[3]{2}   2^{1/3}
2^{1/3}   \sqrt[3]2
e^2   e^{2}
\ln 2   \ln(2)
\log_2 3   \frac{\log 3}{\log 2}
\frac{x}{2}   x/2   0.5x   \frac12 x
6!   720
720   720
\binom{10}{3}   120
1024   2^{10}
2^{10}   1024
10^6   1000000
1000000   10^6   1\ 000\ 000   1 000 000   1,000,000.00
3x+2y=5   3x + 2y = 5   3x+2y-5=0
3x+2y-5=0   y = \frac{5-3x}{2}
y = 2x + 3   2x+3
2x+3   y=2x+3
\begin{pmatrix}1\\2\end{pmatrix}   \begin{pmatrix} 1 \\ 2 \end{pmatrix}
3/4   >> \frac34   >> \dfrac{3}{4}   >> 0.75   >> 3/4
-3/4   >> -\frac{3}{4}
70   >> 70 km/h   >> 70km   >> It is 70°C.
36   >> so 36 in^2   >> 36m^2
2   >> 2nd
1,000   >> $1,000
0   0
-0.5   -\frac12
\infty   \infty
-\infty   -\infty
\emptyset   \varnothing
\text{no solution}   \text{No solution}
\frac{3}{5}   60\%
0.6   60\%
60\%   0.6   \frac35
\frac{\sqrt{3}}{3}   \frac{1}{\sqrt{3}}
\sqrt{3}/3   1/\sqrt{3}
x \in [1,3]   [1,3]
[1,3]   1 \le x \le 3
(1,3)   1<x<3
2k\pi   2\pi k
n(n+1)/2   \frac{n(n+1)}{2}
\frac{n(n+1)}{2}   \frac{n^2+n}{2}
\sin^2 x   (\sin x)^2   \sin(x)^2
\tan x   \frac{\sin x}{\cos x}
|x|   \sqrt{x^2}
\sqrt{x^2}   |x|
4\pi r^2   4 \pi r^{2}
\frac{4}{3}\pi r^3   \frac{4\pi r^3}{3}
101_2   101_{2}   101_{\text{two}}   101_{\mathrm{two}}
\text{AB}_{16}   AB_{16}
2:3   2:3
2 : 3   2 \colon 3
3.14   3.14159
6.63e-34   6.626 \times 10^{-34}
1e-05   >> 1e-5
5\text{ cm}   5cm
5 cm   5\,\text{cm}
50 mm   5\text{ cm}
3 hours   180\text{ minutes}
10 m/s   10\ \text{m/s}   10\,\mathrm{m\,s^{-1}}
10\text{ m/s}   10\text{ meters per second}
9.8\ \mathrm{m/s^2}   9.8\,\mathrm{m/s}^2
9.8   9.8\,\mathrm{m/s^2}
2023-05-06   \text{May 6, 2023}
3:30   3:30
3:30 PM   3{:}30\text{ PM}
3:30 \text{ p.m.}   3:30 \text{ p.m.}
\text{A}   \text{A}
Monday   \mathrm{Monday}
x   x
xy   xy
x \cdot y   xy
2ab   2ba
a+b   b+a
\frac{a}{b}   a/b
\left(\frac{1}{2}, 3\right)   (0.5,3)
x+C   x+C
\frac{x^2}{2}+C   \frac{1}{2}x^2+C
\begin{cases}1\\2\end{cases}   \begin{cases}1\\2\end{cases}
\sqrt{2}+\sqrt{3}   \sqrt{3}+\sqrt{2}
\sqrt{5+2\sqrt{6}}   \sqrt{2}+\sqrt{3}
18   18 \text{ dollars per day}   \$18   \text{18 eggs}   18\text{ eggs}   18 eggs
18   \$18\text{ per day}
540   540 \text{ meters a week}
6   6 \text{ (students)}   |AB| = 6   AB = 6   \overline{AB}=6   S_{\triangle ABC}=6
\dfrac{\sqrt{2}}{2}   \tfrac{\sqrt 2}2
y=-x   -x
x<-2 \text{ or } x>3   (-\infty,-2)\cup(3,\infty)   x>3 \text{ or } x<-2
-2<x<3   (-2,3)
x\ne 2   x \neq 2
\mathbb{R}   \mathbb{R}
\langle 1,2\rangle   \langle 1, 2 \rangle
17   8+9=17   >> 8 + 9 = 17
25   5^2=25
25\pi   25\pi \approx 78.54
78.54   25\pi \approx 78.54
-5   −5   >> #### -5
½   \frac{1}{2}
x²   x^2
3½   3.5
7/2   3½
1234   >> #### 1,234
1.5   >> The cost is $1.50 per unit.
0.08   >> that is 8\%
15   >> 15%
\frac{1}{x+1}   (x+1)^{-1}
x^{1/2}   \sqrt{x}
\frac{1}{\sqrt{x}}   x^{-\frac12}
12\text{ square units}   12   12\text{ units}^2
\text{2 and 3}   2, 3
2 and 3   2\text{ and }3
0.1\overline{6}   0.1\overline{6}
0.\overline{3}   \frac13
\frac13   0.\overline{3}
\cot x   \frac{1}{\tan x}
\arctan 2   \tan^{-1} 2
\arctan(2)   \arctan 2
(2,3),(4,5)   (4,5),(2,3)
\{(1,2),(3,4)\}   \{(3,4),(1,2)\}
(1, -2, 3)   (1,-2,3)
3\%   3\text{ percent}
1 \frac{1}{2}   \frac{3}{2}
1.5 \times 10^8   150000000
150000000   1.5 \times 10^8
150,000,000   150\text{ million}
36\pi   36\pi \text{ cm}^2
36\pi\text{ cm}^2   36\pi
6+2\sqrt3   6+2\sqrt{3}\text{ cm}
\frac{9}{2}   4.5\text{ feet}
-2   x = -2   >> x = - 2
a^2-b^2   (a-b)(a+b)
e^{x}\cos x   \cos(x) e^x
x\ln x - x   x(\ln x-1)
\frac{\ln 8}{\ln 2}   3
$\frac{1}{2}$   1/2
\(\frac{1}{2}\)   1/2
$x=4$   4
$5   5
\sqrt{x-10}   (x-10)^{1/2}
\$32,\!348   32348
32348   \$32,\!348
10,\!080   10080
\frac{270}7\text{ degrees}   \frac{270}{7}^\circ
.0000672   6.72\times 10^{-5}
6.72 \times 10^{-5}   0.0000672
2516_8   2516_8
3R^2   3 R^2
(a+5)(b+2)   (b+2)(a+5)
\text{B,E}   B, E
B, E   \text{B and E}
A, C   C, A
A,C   \text{(A), (C)}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}   \begin{bmatrix} -1/3 \\[4pt] 2/3 \end{bmatrix}
y^2=4x   y^2 - 4x = 0
6 - 5i   -5i+6
6-5i   6-5\mathrm{i}
\text{Evelyn}   Evelyn
\frac{3}{56}   \dfrac{3}{56}
5.4 \text{ cents}   5.4
5.4   5.4\text{ cents}
\left( -\frac{4}{5}, \frac{3}{5} \right)   (-0.8, 0.6)
x^3+3x-6   x^3 + 3x - 6
-\frac{1}{2}x+3   3-\frac{x}{2}
\frac{1}{2}, 3   3, \frac{1}{2}
4+2\sqrt{3}   2(2+\sqrt{3})
\frac{1}{e}   e^{-1}
e^{-1}   \frac1e
\frac{\sqrt{6}-\sqrt{2}}{4}   \frac{\sqrt{2}(\sqrt{3}-1)}{4}
\frac{1}{2}\ln 2   \ln\sqrt{2}
\ln 4   2\ln 2
\log_{10} 2   \log_{10}(2)
n!   n!
(n+1)!   (n+1)!
\binom{n}{2}   \frac{n(n-1)}{2}
\frac{n!}{2}   \frac12 n!
2^{n+1}-2   2(2^n-1)   2\cdot 2^n-2
4^n   2^{2n}
3^{n}   3^n
x=2, x=3   2, 3
x = 2, 3   2,3
2, 3   x = 2, 3
x=2,3   x=2 or x=3
\{2,3\}   x=2, x=3
2,3   \{2,3\}
x \in \{2,3\}   2,3
x\in\{2,3\}   \{2,3\}
-3 \le x \le 5   [-3,5]
[-3,5]   -3\leqslant x\leqslant 5
(-3,5]   -3 < x \le 5
(-\infty, -3) \cup (5, \infty)   x<-3\text{ or }x>5
x < -3 or x > 5   (-\infty,-3)\cup(5,\infty)
x\leq 5   (-\infty,5]
1:2:3   1:2:3
60^\circ   60^{\circ}   60\,^\circ
60°   60
60   60\degree
32°F   32^\circ\text{F}
32^\circ F   32^\circ \text{F}
25 °C   25^\circ\mathrm{C}
\text{All real numbers}   \text{all real numbers}
DNE   \text{DNE}
undefined   \text{Undefined}
\text{None}   none
True   \text{true}
5\sqrt{2}\text{ cm}   5\sqrt{2}
12\pi   12\pi \text{ square inches}
12\pi\text{ in}^2   12\pi
8\text{ in.}   8
8   8\text{ in.}
\frac{7}{2}\text{ hours}   3.5
3.5 hours   3.5\text{ h}
2 hours   120\text{ min}
0.375   \frac{3}{8}
37.5\%   \frac{3}{8}
37.5%   37.5
37.5   37.5\%
33\frac{1}{3}\%   \frac{100}{3}\%
1000   10^3
2.5\text{ million}   2500000
\$2.5\text{ million}   2{,}500{,}000
$1.2\times10^6$   1200000
-1, 0, 1   0, \pm 1
1,2,3,4   1,2,3,4
3,5,7   3, 5 \text{ and } 7
3, 5, 7   3, 5, \text{ and } 7
(1,2), (3,4)   (1,2)\text{ and }(3,4)
(2,-1)   (2,-1)
(0,0),(1,1)   (1,1), (0,0)
x+2y-z=3   x + 2y - z - 3 = 0
y=\frac{1}{2}x   x=2y
y = 3   3
y=x^2   y = x^2
r = 2\cos\theta   2\cos \theta
x^2+(y-1)^2=4   x^2+y^2-2y-3=0
\sqrt{2}/2   \frac{1}{\sqrt{2}}
\frac{\sqrt{2}}{2}   2^{-1/2}
1.414   \sqrt{2}
2\sqrt{5}   \sqrt{20}
\sqrt[4]{8}   8^{\frac14}
8^{1/4}   2^{3/4}
\tan^{-1}(2)   \arctan 2
\cos^2\theta   1-\sin^2\theta
\sec x   \frac{1}{\cos x}
\sin 2x   2\sin x\cos x
2\sin x   2\sin(x)
\sin(2x)   \sin 2x
\mathbf{i}+2\mathbf{j}   \mathbf{i} + 2\mathbf{j}
\overrightarrow{AB}   \overrightarrow{AB}
\triangle ABC   \triangle ABC
\angle A   \angle A
\frac{dy}{dx}=2x   2x
f'(x)=2x   2x
2x   f'(x) = 2x   y' = 2x   \frac{dy}{dx} = 2x
0.3   P(A)=0.3
\frac{13}{4}   3.25
3.25   3\frac14   13/4
-3.25   -3\frac{1}{4}
80   80\ \text{km/h}
80 km/h   80\,\text{km}/\text{h}
80\text{ km/h}   80\text{ kilometers per hour}
80 mph   80\text{ miles per hour}
5\text{ m/s}^2   5\ \mathrm{m/s^2}
5 kg   5000\text{ g}
3 dozen   36
January 5, 2020   2020-01-05
5 January 2020   \text{January 5, 2020}
12:30   12\!:\!30
5:00 PM   5:00\text{ p.m.}
4   \text{4}   \text{ 4 }   \mathrm{4}   4\text{ }   \,4   $4$   \(4\)   {4}   \left(4\right)
4   4\quad   \color{red}{4}   \color{red} 4   \underline{4}   \mathbf 4   ~4~
4   \textcolor{blue}{4}
a^{2}b   b a^2
ab   ab
\alpha+\beta   \beta+\alpha
2\alpha   2α
\theta   θ
x_{1}+x_{2}   x_1+x_2
\lambda_1   λ₁
\frac{x^2-1}{x-1}   x+1
x+1   \frac{x^2-1}{x-1}
1-x   -(x-1)
x(x-1)   x^2-x
\frac{1}{1-x}   -\frac{1}{x-1}
3x-2y   -2y+3x
\frac{a+b}{2}   (a+b)/2   \frac a2+\frac b2
\sqrt{a^2+b^2}   (a^2+b^2)^{1/2}
3, 4   x=3, y=4
"""

WRONG = r"""
5   5, 6   4, 5   5 \text{ or } 6   \{5\}   [5]   5x   5+0x   5 \cdot 1   \text{5 or 6}
5   5 / 1 + 0   5-0   |5|   \lceil 4.5\rceil   \sqrt{25}+0   y=x=5   x = 5 = 6   x=6=5   4+2=5
5   x+y=5   2x=5   x^2=5   x<=5   x\in\{5\}   x\in\mathbb{R}   5 \approx 6   5.4   4.9999999
5   5.0000001   5\pm0   \frac{5}{1}0   5\%5   >> The answer is 5 or 6   >> 5x   >> x5   >> 5\pi
5   >> -5   >> − 5   >> x = -5   >> (−5)   >> (-5)   >> =-5   >> =−5   >> is $-5$   >> **-5**
5   >> −$5   >> -$5   >> $-5   >> -\$5   5\text{ million}   5\text{ hundred}   5\text{ times } 3
5   5\text{ plus one}   5\text{ less than x}   5\text{ or more}   5 \text{ dozen}
5   \text{half of }5   5\text{ tenths}   5\text{ percent more}   101_2
5   >> \boxed{\boxed{4}\boxed{5}}   >> \boxed{4 \boxed{5}}   >> \boxed{5 \boxed{}}
5   >> \boxed{5}\boxed{6}   >> \boxed{6}, \boxed{5}   >> \boxed{6} or \boxed{5}
5   >> \boxed{6}$ and $\boxed{5}   5\text{ if }x>0   5; 6   5\;6   5\ 6   5_6   ^5   5^   5?
5   5 \to 6   5\mid 6   5\mod 6   5 \pmod 6   5\equiv 11   \overline{5}   \sim 5   \not 5   \neg 5
5   \lnot 5   !5   5'   V   five   5\text{,}6   5\text{/}6   5\text{ to 6}   5\text{ up to six}
5   5\text{ fifteen}   \cancel{5}   5̶   5 % 6   5=x=6   >> \boxed{5   \frac{14}{2}=5   \sqrt{7}=5
5   \sqrt7=5   sqrt(7)=5   \sin x=5   \pi=5   \log_2 9=5   \frac{x}{2}=5   7!=5   |7|=5   7_2=5
5   (7)=5
50   >> \boxed{5}0
6   >> The answer is 5 or 6   >> 5-6   >> 5–6   >> 5, 6   >> 5 to 6   >> $5/6$   a+b=6
2   >> x^2   >> $x^{2}$   >> log_2   >> H2   >> x_2   >> a_{2}   >> 1½   >> 1 1/2
3   >> 2\sqrt{3}   >> \sqrt{3}   >> \sqrt3   >> 2\sqrt 3   >> \frac{3}{4}   З   \log_2 8
7   >> x = 6/7   7\text{ is incorrect}   7 is not it   7 hmm 8   \text{7, I think, or 8}
7   7\text{ or eight}   7\text{ but maybe not}   7\text{ eight}   \text{either }7
4   >> \frac{3}{4}   >> \dfrac34   >> \frac{x}{4}   >> \frac{\pi}{4}   >> \tfrac{3}{4}
4   >> 3 \over 4   >> 3/4   >> 3 / 4   >> 3÷4   >> 3⁄4   >> ¾
34   >> \dfrac34
no   on   n*o   n \cdot o   o n   not no   yes   no and yes   yes, no   no\text{ or }yes
abc   cba
e   2.718
i   -i
x   y   X   x \cdot 1 + 0y   \sqrt{x^2}   \ln e^x   \arcsin(\sin x)
x+1   X+1   \text{x}+1+0y   x+1 \text{ or } x-1   x+1, x-1   \pm x+1   x+1=x-1   ax+b
x+1   x+1 \approx x
A   B   A, B   AB   A or B   (A) or (B)   A/B   (A) and B   A. B. C.   (A)(B)(C)(D)   ABCD   A|B
A   not A   (A) is wrong, C   А
B   \text{A or B}
(1,2)   (2,1)   1,2   [1,2]   (1,2),(3,4)   (1,2]   (x,y)   (1,2,3)   x=2, y=1   \frac{1}{2}   1<2
(1,2)   \begin{pmatrix}1\\2\end{pmatrix}
1,2   1   12   1.2   (1,2)   1,2,3
1, 2   1,1,2   1,1   \{1,2,2\}   \{1\},\{2\}
x=1,y=2   x=2,y=1   2,1   x=1
[1,2]   (1,2)   [1,3]   x   1 < x < 2   [1,2]\cup[3,4]
x>3   3   x<3   x=3   x>3,x<3   3>x   x>-3
y=2x+1   y=2x   0=0   y=y   y   x=2y+1   (y-2x-1)^2=0   (y-2x-1)(x-y)=0   y=2x+1=5
x^2+y^2=1   x^2+y^2   1
x=5   x=x   x   y=5   x=5,6   x-5=0   2x=10
5 cm   5 km   500 cm
5\text{ cm}   5\text{ cm}^2
5\text{ cm}^2   5\text{ cm}^3
5 m   5 s
5 apples   5 oranges
5 mph   5 km/h
5\text{ mW}   5\text{ MW}
101_2   101   5   101_3   110_2
101   101_2
2012   2023-05-06
2023-05-06   2012   2023-06-05
5/6/2023   6/5/2023
3:30   3.5   6:60
1:2   0.5
6.626\times10^{-34}   1.6\times10^{-19}   0   6.6\times10^{-34}
1e-05   0   1e-06
1e-7   2e-7
0.0000001   0.0000002
\frac{1}{3}   0.33
\frac13   0.3334
\sqrt{2}   1.41
\pi   3.14   \frac{22}{7}   \frac{355}{113}
3.14   3.15
0.5   0.54   0.45   0.5\%
e^{\pi\sqrt{163}}   262537412640768744
262537412640768744   e^{\pi\sqrt{163}}
262537412640768743.99   262537412640768743
x^2-1   x^2-1+C
x^2+C   x^2   C
x^2   x^2+C   x^{2.0000001}
\sin x   x   \cos x
\sqrt{x}   x
9   3^2+0
12   3\times4   3*4   3(4)   (3)(4)   24/2 \cdot 1   1 2
0   \emptyset   >> \boxed{}   >> \boxed{ }   \{\}   \text{none}   -   x-x   O
\emptyset   0   \{0\}
\infty   -\infty   x   \frac{1}{0}   2\infty
56   5\ 6
1   l   I   \sin 90^\circ
\begin{pmatrix}1&2\\3&4\end{pmatrix}   \begin{vmatrix}1&2\\3&4\end{vmatrix}
\begin{pmatrix}1&2\end{pmatrix}   \begin{pmatrix}1\\2\end{pmatrix}
-2   \begin{vmatrix}1&2\\3&4\end{vmatrix}
90^\circ   90\text{ radians}
90   \frac{\pi}{2}
30^\circ   60^\circ
\$5   5\text{ cents}   500   €5
20\%   2\%   0.02
0.2   2\%
20   200\%
1024   2^{11}   10^{24}   x^{10}
10   1010_2
-1   i^2   e^{i\pi}
17   7   1 7
1/2   1\2
yes   yes no   yes/no
6.02\times10^{23}   6.02
1/6   1/2/3
64   2^3^2
512   2^3^2
15   5!!
\$18 \text{ per day}   \$18 \text{ per week}
78.54   \sqrt25\pi\approx 78.54
3, 4   x=4, y=3
-3.25   0-3\frac14
x=3, y=4   3, 4   x=3, x=4
"""


def rows(table: str) -> list[tuple[str, str]]:
    """Reference and completion of every answer in a table."""
    found = []
    for line in table.strip().splitlines():
        reference, *answers = line.split("   ")
        for answer in answers:
            whole = answer.startswith(">> ")
            found.append((reference, answer[3:] if whole else f"\\boxed{{{answer}}}"))
    return found
